"""Slot values: made-up words and strings, people, occupations, places, topics, plain words.

Lists are `Split`s; half of all values are made up, so that a value is copied and not recognised.
"""

import base64
import random

from bench.demo_train.phrasing import Split, corpus_word, is_held_out, words

# Made-up words and strings --------------------------------------------------------------------

_ONSETS = (
    "b c ch d f g h j k l m n p qu r s t v w z br cl cr dr fl gl gr pl pr st tr th sh ll ñ y x"
).split() + [""] * 4
_NUCLEI = "a e i o u a e i o u a e o á é í ó ú ia ie io ue ei ou ai oa".split()
_CODAS = [""] * 8 + "n r s l m t d nd rk st ng x ck".split()


def _syllable(rng: random.Random) -> str:
    return rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS)


def _blend(rng: random.Random) -> str:
    """The beginning of one word and the end of another: has the tokens that real words have."""
    start, end = corpus_word(rng), corpus_word(rng)
    return start[: rng.randint(1, len(start))] + end[rng.randint(0, len(end) - 1) :]


def made_up_word(rng: random.Random, held: bool) -> str:
    """A word of one to four made-up syllables, or of pieces of two real words."""
    while True:
        if rng.random() < 0.5:
            word = _blend(rng)
        else:
            word = "".join(_syllable(rng) for _ in range(rng.choice((1, 2, 2, 2, 3, 3, 4))))
        if is_held_out(word) == held and len(word) > 2:
            return word


def made_up_phrase(rng: random.Random, held: bool) -> str:
    """One to three words, some of them real; at least one is made up."""
    size = rng.choice((1, 1, 2, 2, 3))
    sure = rng.randrange(size)
    return " ".join(
        made_up_word(rng, held) if i == sure or rng.random() < 0.4 else corpus_word(rng)
        for i in range(size)
    )


_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",
    "0123456789abcdef",
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-",
    "0123456789",
    "!#$%&()*+-./:;<=>?@[]^_{|}~",
)
_EMOJI = "😀😂🙂😍🤔😎😢😡👍👎🙏👏🔥✨🎉🚀🌍🌙⭐☀🌧❄🐶🐱🦊🐍🍎🍕☕🍺⚽🎸📚💡💻🔑❤💙✅❌"
_CJK = (
    "日本語中文字漢韓国東京大阪北京上海你好世界谢谢再见学习今天天气火水木金土"
    "人山川田こんにちはありがとうカタカナ안녕하세요감사합니다"
)


def odd_string(rng: random.Random, held: bool) -> str:
    """Something no dictionary has: an identifier, hex, base64, symbols, emoji, other scripts."""
    while True:
        kind = rng.random()
        if kind < 0.6:
            alphabet = rng.choice(_ALPHABETS)
            text = "".join(rng.choice(alphabet) for _ in range(rng.randint(2, 10)))
        elif kind < 0.7:
            text = base64.b64encode(rng.randbytes(rng.randint(3, 9))).decode()
        elif kind < 0.85:
            text = "".join(rng.choice(_EMOJI) for _ in range(rng.randint(1, 3)))
        else:
            text = "".join(rng.choice(_CJK) for _ in range(rng.randint(1, 6)))
        if is_held_out(text) == held:
            return text


# People ---------------------------------------------------------------------------------------

FIRST_NAMES = Split(
    words(
        """
        John, Mary, Peter, Anna, James, Linda, Robert, Susan, Michael, Karen, David, Laura,
        Thomas, Emma, Daniel, Olivia, George, Alice, Henry, Julia, Paul, Sarah, Mark, Emily,
        Kevin, Grace, Brian, Rachel, Steven, Nancy, Frank, Helen, María, José, Juan, Ana, Luis,
        Carmen, Carlos, Lucía, Pedro, Sofía, Miguel, Elena, Jorge, Isabel, Diego, Marta, Andrés,
        Paula, Pablo, Rosa, Javier, Teresa, Manuel, Pilar, Sergio, Raquel, Fernando, Silvia,
        Ricardo, Valeria, Ahmed, Fatima, Wei, Yuki, Ivan, Olga, Pierre, Amélie, Hans, Greta,
        Marco, Giulia, Lars, Ingrid, Raj, Priya
        """
    ),
    words(
        """
        William, Sophie, Edward, Charlotte, Oscar, Ruth, Álvaro, Beatriz, Gonzalo, Nuria, Rubén,
        Ximena, Kenji, Aisha, Dmitri, Chloé, Walter, Nora
        """
    ),
)
LAST_NAMES = Split(
    words(
        """
        Smith, Johnson, Brown, Taylor, Miller, Wilson, Moore, Clark, Lewis, Walker, Hall, Young,
        King, Wright, Hill, Green, Adams, Baker, Carter, Turner, García, Martínez, López, Sánchez,
        Pérez, Gómez, Díaz, Torres, Ramírez, Flores, Ruiz, Vargas, Castro, Ortega, Rojas, Medina,
        Müller, Schmidt, Rossi, Dubois, Tanaka, Chen, Kumar, Ivanov, Silva, Costa, Kim, Nguyen,
        Novak, Hansen
        """
    ),
    words("""
    Cooper, Hughes, Bennett, Navarro, Domínguez, Ibáñez, Fischer, Moreau, Sato, Petrov, Andersson,
    Quispe
    """),
)


def person(rng: random.Random, held: bool) -> str:
    """A full name, most often first and last; a third of the parts are made up."""

    def part(pool: Split) -> str:
        return made_up_word(rng, held).capitalize() if rng.random() < 0.35 else pool.pick(rng, held)

    shape = rng.random()
    if shape < 0.15:
        return part(FIRST_NAMES)
    if shape < 0.8:
        return f"{part(FIRST_NAMES)} {part(LAST_NAMES)}"
    if shape < 0.92:
        return f"{part(FIRST_NAMES)} {part(LAST_NAMES)} {part(LAST_NAMES)}"
    joint = rng.choice((" de ", " de la ", "-", f" {rng.choice('ABCDEFGHJKLMPRSTV')}. "))
    return f"{part(FIRST_NAMES)}{joint}{part(LAST_NAMES)}"


def first_name(rng: random.Random, held: bool) -> str:
    if rng.random() < 0.35:
        return made_up_word(rng, held).capitalize()
    return FIRST_NAMES.pick(rng, held)


OCCUPATIONS = {
    "en": Split(
        words(
            """
            software engineer, nurse, teacher, doctor, lawyer, carpenter, electrician, pilot,
            chef, architect, painter, journalist, photographer, farmer, musician, plumber,
            dentist, pharmacist, writer, actor, biologist, chemist, mechanic, baker, librarian,
            accountant, police officer, firefighter, civil engineer, data scientist, graphic
            designer, web developer, project manager, taxi driver, math teacher, shop assistant,
            flight attendant, sales manager, truck driver, marketing director, high school
            teacher, nuclear physicist, tour guide
            """
        ),
        words(
            """
            veterinarian, translator, mechanical engineer, history teacher, tailor, fisherman,
            product manager, surgeon, bus driver, astronaut, waiter, systems administrator
            """
        ),
    ),
    "es": Split(
        words(
            """
            ingeniero de software, enfermera, maestro, médico, abogada, carpintero, electricista,
            piloto, cocinero, arquitecta, pintor, periodista, fotógrafo, agricultor, músico,
            fontanero, dentista, farmacéutica, escritora, actor, bióloga, químico, mecánico,
            panadero, bibliotecaria, contador, policía, bombero, ingeniera civil, científica de
            datos, diseñador gráfico, desarrolladora web, jefe de proyecto, taxista, profesora de
            matemáticas, vendedor, azafata, jefa de ventas, camionero, directora de marketing,
            profesor de instituto, física nuclear
            """
        ),
        words(
            """
            veterinaria, traductor, ingeniero mecánico, profesora de historia, sastre, pescador,
            jefa de producto, cirujano, conductor de autobús, astronauta, camarera, administrador
            de sistemas
            """
        ),
    ),
}


def occupation(rng: random.Random, lang: str, held: bool) -> str:
    if rng.random() < 0.5:
        return made_up_phrase(rng, held)
    return OCCUPATIONS[lang].pick(rng, held)


# Places, topics, plain words ------------------------------------------------------------------

CITIES = Split(
    words(
        """
        Paris, París, London, Londres, Madrid, Berlin, Berlín, Rome, Roma, Tokyo, Tokio, New York,
        Nueva York, Boston, Chicago, Lima, Bogotá, Quito, Caracas, Santiago, Buenos Aires,
        Montevideo, Barcelona, Valencia, Sevilla, Lisbon, Lisboa, Vienna, Viena, Prague, Praga,
        Oslo, Stockholm, Estocolmo, Helsinki, Moscow, Moscú, Beijing, Pekín, Seoul, Delhi, Mumbai,
        Sydney, Toronto, Cairo, El Cairo, San Francisco, Los Angeles, Ciudad de México, Mexico
        City, Miami, Amsterdam, Dublin, Zurich, Hamburg, Munich, Milan, Naples, Kyoto, Osaka,
        Bilbao, Granada, San Francisco, CA
        """
    ),
    words(
        """
        Seattle, Denver, Houston, Guadalajara, Cusco, Medellín, Rosario, Málaga, Zaragoza, Oporto,
        Lyon, Marsella, Venice, Florencia, Edinburgh, Bruselas, Budapest, Varsovia, Istanbul,
        Nairobi, Bangkok, Hanoi, Salt Lake City, Perth
        """
    ),
)


def city(rng: random.Random, held: bool) -> str:
    shape = rng.random()
    if shape < 0.45:
        return CITIES.pick(rng, held)
    name = made_up_phrase(rng, held).title() if shape < 0.85 else CITIES.pick(rng, held)
    if shape < 0.75:
        return name
    regions = ("CA", "NY", "TX", "España", "Francia", "Italy", made_up_word(rng, held).title())
    return f"{name}, {rng.choice(regions)}"


TOPICS = {
    "en": Split(
        words(
            """
            the sea, the moon, autumn, love, the rain, a cat, my dog, winter, the night, the
            stars, coffee, friendship, the sun, the wind, music, time, the mountains, spring,
            summer, a river, the forest, home, hope, snow, bread, computers, the city, trains, my
            mother, flowers, birds, dreams, silence, the sky, a garden, fire, football
            """
        ),
        words("""
        the desert, tea, my grandmother, robots, the ocean, a horse, clouds, freedom, chocolate,
        an old tree, the dawn
        """),
    ),
    "es": Split(
        words(
            """
            el mar, la luna, el otoño, el amor, la lluvia, un gato, mi perro, el invierno, la
            noche, las estrellas, el café, la amistad, el sol, el viento, la música, el tiempo,
            las montañas, la primavera, el verano, un río, el bosque, la casa, la esperanza, la
            nieve, el pan, los ordenadores, la ciudad, los trenes, mi madre, las flores, los
            pájaros, los sueños, el silencio, el cielo, un jardín, el fuego, el fútbol
            """
        ),
        words(
            """
            el desierto, el té, mi abuela, los robots, el océano, un caballo, las nubes, la
            libertad, el chocolate, un árbol viejo, el amanecer
            """
        ),
    ),
}


_ARTICLES = {"en": ("the", "a", "my", "our", ""), "es": ("el", "la", "los", "un", "una", "mi", "")}


def topic(rng: random.Random, lang: str, held: bool) -> str:
    if rng.random() < 0.5:
        return f"{rng.choice(_ARTICLES[lang])} {made_up_phrase(rng, held)}".strip()
    return TOPICS[lang].pick(rng, held)


PLAIN_WORDS = Split(
    words(
        """
        the, quick, brown, fox, jumps, over, lazy, dog, a, house, tree, water, fire, sky, blue,
        red, green, small, big, run, walk, hello, world, one, two, three, yes, no, and, with,
        from, table, chair, window, book, paper, city, road, night, day, sun, moon, el, la, los,
        las, de, que, y, en, un, una, casa, perro, gato, árbol, agua, fuego, cielo, azul, rojo,
        verde, pequeño, grande, correr, hola, mundo, uno, dos, tres, sí, mesa, silla, libro,
        ciudad, calle, noche, día, sol, luna, rápido, lento, marrón, zorro, salta, sobre,
        perezoso, this, is, test, of, my, name, esto, es, prueba
        """
    ),
    words(
        """
        lion, bridge, sugar, orange, purple, sings, under, happy, doctor, bottle, león, puente,
        azúcar, naranja, morado, canta, bajo, feliz, botella, nube, thunder, yellow, amarillo,
        trueno, jump, saltar
        """
    ),
)


def any_word(rng: random.Random, held: bool) -> str:
    """A word to be copied: often made up, so that copying is learned and not the words."""
    kind = rng.random()
    if kind < 0.25:
        return PLAIN_WORDS.pick(rng, held and rng.random() < 0.5)
    if kind < 0.4:
        return corpus_word(rng)
    if kind < 0.85:
        word = made_up_word(rng, held)
        if rng.random() < 0.2:
            return word.capitalize()
        return word.upper() if rng.random() < 0.05 else word
    return odd_string(rng, held)
