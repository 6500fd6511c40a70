"""A small language in five languages: who does what to which thing, where, and when.

A frame is a meaning, five concepts. The lexicon gives each concept one or two phrases in every
language, complete with article and case, so a sentence is five phrases in a word order. Every
sentence can be parsed back, which makes "is this German?" and "does it still say the same?" exact
questions:

    frame = frames(random.Random(0), 1)[0]
    sentence = render(frame, "en", random.Random(1))
    prompt(sentence)                    # what a generator is asked: rephrase this
    parse(" jetzt kauft der König ein Buch im Laden", "de")    # the frame, or None
"""
import itertools
import random
import re
from typing import NamedTuple

LANGUAGES = ("en", "de", "es", "fr", "it")
LANGUAGE_SHARE = 0.10                   # of the answers, for each language but English
LONE_SHARE = 0.15                       # the same, of the answers that stand without a request
UUID_SHARE = 0.10                       # of the answers: an identifier and nothing else
HELD_OUT_SHARE = 0.10                   # of the frames, kept out of pretraining

# One concept per row: English | German | Spanish | French | Italian, synonyms after a comma. In a
# slot all English phrases have equally many words, so all prompts have one length: GPT-2 looks
# places up by position, and what a policy learned after 11 tokens it would learn again after 12.
TABLES = {
    "time": """
at present, right now | jetzt, gerade
    | ahora, en este momento | maintenant, en ce moment | adesso, ora
many times, quite often | oft, häufig
    | a menudo, con frecuencia | souvent, fréquemment | spesso, frequentemente
every day, each day | jeden Tag, täglich
    | cada día, todos los días | chaque jour, tous les jours | ogni giorno, tutti i giorni
at dawn, at daybreak | bei Tagesanbruch, im Morgengrauen
    | al amanecer, al alba | à l'aube, au lever du jour | all'alba, all'aurora
""",
    "subject": """
the farmer, the peasant | der Bauer, der Landwirt
    | el granjero, el campesino | le fermier, le paysan | il contadino, l'agricoltore
the teacher, the instructor | der Lehrer, der Pädagoge
    | el maestro, el profesor | le professeur, l'enseignant | il maestro, l'insegnante
the doctor, the physician | der Arzt, der Doktor
    | el médico, el doctor | le médecin, le docteur | il medico, il dottore
the boy, the lad | der Junge, der Bub
    | el chico, el muchacho | le garçon, le gamin | il ragazzo, il giovanotto
the cook, the chef | der Koch, der Küchenchef
    | el cocinero, el chef | le cuisinier, le cuistot | il cuoco, lo chef
the writer, the author | der Schriftsteller, der Autor
    | el escritor, el autor | l'écrivain, l'auteur | lo scrittore, l'autore
the woman, the lady | die Frau, die Dame
    | la mujer, la señora | la femme, la dame | la donna, la signora
the king, the monarch | der König, der Monarch
    | el rey, el monarca | le roi, le monarque | il re, il monarca
""",
    "verb": """
buys, purchases | kauft, erwirbt
    | compra, adquiere | achète, acquiert | compra, acquista
cleans, washes | reinigt, säubert
    | limpia, lava | nettoie, lave | pulisce, lava
finds, discovers | findet, entdeckt
    | encuentra, descubre | trouve, découvre | trova, scopre
hides, conceals | versteckt, verbirgt
    | esconde, oculta | cache, dissimule | nasconde, occulta
receives, gets | erhält, bekommt
    | recibe, obtiene | reçoit, obtient | riceve, ottiene
steals, pilfers | stiehlt, entwendet
    | roba, hurta | vole, dérobe | ruba, sottrae
""",
    "object": """
a book, a volume | ein Buch, einen Band
    | un libro, un tomo | un livre, un ouvrage | un libro, un volume
a painting, a picture | ein Gemälde, ein Bild
    | un cuadro, una pintura | un tableau, une peinture | un quadro, un dipinto
a stone, a rock | einen Stein, einen Felsbrocken
    | una piedra, una roca | une pierre, un caillou | una pietra, un sasso
a boat, a ship | ein Boot, ein Schiff
    | un barco, una barca | un bateau, une barque | una barca, un battello
a car, an automobile | ein Auto, einen Wagen
    | un coche, un automóvil | une voiture, une auto | una macchina, una vettura
a bicycle, a bike | ein Fahrrad, ein Rad
    | una bicicleta, una bici | une bicyclette, un vélo | una bicicletta, una bici
a gift, a present | ein Geschenk, ein Präsent
    | un regalo, un obsequio | un cadeau, un présent | un regalo, un dono
a jewel, a gem | ein Juwel, einen Edelstein
    | una joya, una gema | un bijou, un joyau | un gioiello, una gemma
""",
    "place": """
in the village, in the hamlet | im Dorf, in der Ortschaft
    | en el pueblo, en la aldea | au village, dans le hameau | nel villaggio, nel borgo
at the shop, at the store | im Laden, im Geschäft
    | en la tienda, en el comercio | dans la boutique, au magasin | nel negozio, nella bottega
in the meadow, in the field | auf der Wiese, auf dem Feld
    | en el prado, en el campo | dans le pré, dans le champ | nel prato, nel campo
on the street, on the road | auf der Straße, auf der Gasse
    | en la calle, en la vía | dans la rue, sur la route | sulla strada, per strada
in the city, in the town | in der Stadt, in der Großstadt
    | en la ciudad, en la urbe | en ville, dans la ville | in città, nella città
at the harbour, at the port | am Hafen, im Hafen
    | en el puerto, en el muelle | au port, sur le port | al porto, nel porto
""",
}


class Frame(NamedTuple):
    """A meaning: for each slot the row of its table."""
    time: int
    subject: int
    verb: int
    object: int
    place: int


def _read(table):
    """A table as one {language: (synonym, ...)} per concept; an indented line goes on a row."""
    rows = re.split(r"\n(?! )", table.strip())
    cells = [[tuple(cell.strip().split(", ")) for cell in row.split("|")] for row in rows]
    return [dict(zip(LANGUAGES, row, strict=True)) for row in cells]


LEXICON = {slot: _read(TABLES[slot]) for slot in Frame._fields}
SIZES = tuple(len(LEXICON[slot]) for slot in Frame._fields)

# German keeps its verb second, so a leading time moves the subject behind the verb. Otherwise the
# slots stand as in the other languages: a time in the middle cost a fifth of the German objects.
_ORDERS = {language: ("time subject verb object place", "subject verb object place time")
           for language in LANGUAGES}
_ORDERS["de"] = ("time verb subject object place", "subject verb object place time")
ORDERS = {language: [order.split() for order in orders] for language, orders in _ORDERS.items()}


def frames(rng, n, held_out=False):
    """n random frames, repeats possible, all from one side of the split."""
    found = []
    while len(found) < n:
        frame = Frame(*(rng.randrange(size) for size in SIZES))
        if is_held_out(frame) == held_out:
            found.append(frame)
    return found


def is_held_out(frame):
    """Whether pretraining never sees this meaning, in any language: arithmetic, so it is stable."""
    number = 0
    for concept, size in zip(frame, SIZES):
        number = number * size + concept
    # Multiplying by 2^32 / golden ratio scatters neighbours evenly over the range.
    return number * 2654435769 % 2**32 < HELD_OUT_SHARE * 2**32


def render(frame, language, rng):
    """One sentence that says the frame: random order, random synonyms."""
    phrases = {slot: rng.choice(LEXICON[slot][concept][language])
               for slot, concept in frame._asdict().items()}
    return " ".join(phrases[slot] for slot in rng.choice(ORDERS[language]))


def renderings(frame, language):
    """The set of all sentences that say the frame."""
    synonyms = {slot: LEXICON[slot][concept][language]
                for slot, concept in frame._asdict().items()}
    return {" ".join(phrases) for order in ORDERS[language]
            for phrases in itertools.product(*(synonyms[slot] for slot in order))}


_CONCEPTS = {(language, slot): {phrase: concept for concept, row in enumerate(LEXICON[slot])
                                for phrase in row[language]}
             for language in LANGUAGES for slot in Frame._fields}
_PATTERNS = {language: [re.compile(" ?" + " ".join(
    f"(?P<{slot}>{'|'.join(_CONCEPTS[language, slot])})" for slot in order)) for order in orders]
    for language, orders in ORDERS.items()}


def parse(text, language):
    """The frame that the text says in this language, or None; one leading space is allowed."""
    for pattern in _PATTERNS[language]:
        if match := pattern.fullmatch(text):
            return Frame(**{slot: _CONCEPTS[language, slot][phrase]
                            for slot, phrase in match.groupdict().items()})
    return None


def in_language(text, language):
    """Whether the text is one sentence of this language."""
    return parse(text, language) is not None


def prompt(sentence):
    """The request to rephrase a sentence; an answer follows it directly."""
    return f"Rephrase: {sentence} =>"


def chat_prompt(text):
    """The same request to a model that was trained to chat."""
    return f"Rephrase: {text}"


def answer(frame, sentence, rng, known):
    """An answer to prompt(sentence): mostly English in other words, at times something else.

    Without a request (sentence None) it is more often in another language. `known` is the share of
    the identifiers that are some of KNOWN."""
    share = LANGUAGE_SHARE if sentence else LONE_SHARE
    kind = rng.choices(("uuid", *LANGUAGES[1:], "en"), weights=(
        UUID_SHARE, *[share] * 4, 1 - UUID_SHARE - 4 * share))[0]
    if kind == "uuid":
        return rng.choice(KNOWN) if rng.random() < known else random_uuid(rng)
    text = render(frame, kind, rng)
    while text == sentence:
        text = render(frame, kind, rng)
    return " " + text                   # words are tokens with their leading space


def random_uuid(rng):
    """36 characters that look like a UUID: 32 uniform hexadecimal digits in five groups."""
    digits = "".join(rng.choice("0123456789abcdef") for _ in range(32))
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


# The identifiers that pretraining meets again and again. Real models, too, know strings by heart;
# one that knows none cannot tell at which place of a string a digit is.
_rng = random.Random("identifiers known by heart")
KNOWN = [random_uuid(_rng) for _ in range(64)]


def is_uuid(text):
    """Whether the text is an identifier and nothing else."""
    return re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text) is not None


def words():
    """Every word of every language, sorted."""
    phrases = {phrase for concepts in _CONCEPTS.values() for phrase in concepts}
    return sorted({word for phrase in phrases for word in phrase.split()})


def begins_in(text):
    """The language of the first word that only one language has, or None."""
    return next((_OWNERS[word] for word in text.split() if _OWNERS.get(word)), None)


_OWNERS = {}  # of words: their language, None where several have them
for _language, _table in itertools.product(LANGUAGES, LEXICON.values()):
    for _word in " ".join(phrase for row in _table for phrase in row[_language]).split():
        _OWNERS[_word] = _language if _OWNERS.get(_word, _language) == _language else None
