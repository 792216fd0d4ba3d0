"""Exchanges about what the model knows by heart: capitals, terms, poems; and raw text of the same.

Only phrasings are held out for capitals and terms; a poem's topic is a slot value like any other.
"""

import random

from bench.demo_train.knowledge import CAPITALS, TERMS
from bench.demo_train.phrasing import Exchange, Split, phrase, phrases, polite, talk, words
from bench.demo_train.slots import made_up_phrase, made_up_word, topic

# Capitals -------------------------------------------------------------------------------------

_CAPITAL = {
    "en": Split(
        phrases("""
        {fact_c} is a country. What is its capital(/ city)? | From (which/what) city is {fact_c}
        (governed/ruled)? | (What/Which) city (governs/rules/is the main city of) {fact_c}? | Do
        you know {fact_c}'s capital? | Give me {fact_c}'s capital city | In {fact_c}, what is the
        capital? | (What is/What's/Which is) the capital (/city )of {fact_c}? | (The
        capital/Capital)(/ city) of {fact_c}(/?) | (Tell me/Name/Say/Give me/Write) the capital
        (/city )of {fact_c}(/.) | (Which/What) city is the capital of {fact_c}? | Do you know the
        capital of {fact_c}? | Can you (tell me/name/say) the capital of {fact_c}? | {fact_c}(:
        capital?/ capital/'s capital?) | I want to know the capital of {fact_c} | The capital of
        {fact_c} is | (And/So) (what is /)the capital of {fact_c}? | What about the capital of
        {fact_c}? | What is {fact_c}'s capital(/ city)? | What is the name of the capital of
        {fact_c}? | {fact_c} has which capital? | (What/Which) capital does {fact_c} have? | I
        need the capital of {fact_c} | How is the capital of {fact_c} called?
        """),
        phrases("""
        Would you tell me {fact_c}'s capital city? | Could you tell me the capital of {fact_c}? |
        Which city is {fact_c}'s capital? | Please name the capital city of {fact_c} | Do you know
        what the capital of {fact_c} is? | Tell me which city is the capital of {fact_c} | Which
        city is {fact_c} governed from, what is its capital?
        """),
    ),
    "es": Split(
        phrases("""
        {fact_c} es un país. ¿Cuál es su capital? | ¿(Desde/En) qué ciudad se gobierna {fact_c}? |
        En {fact_c}, ¿cuál es la capital? | Dame el nombre de la capital de {fact_c} |
        ¿(Cuál/Cual/Qué ciudad) es la capital de {fact_c}? | (Capital/La capital/La ciudad
        capital) de {fact_c} | ¿Capital de {fact_c}? | (Dime/Nombra/Di/Dame/Escribe) la capital de
        {fact_c}(/.) | ¿Sabes (la/cuál es la) capital de {fact_c}? | ¿Puedes
        (decirme/nombrar/darme) la capital de {fact_c}? | {fact_c}: ¿capital? | {fact_c}, capital
        | Quiero saber la capital de {fact_c} | La capital de {fact_c} es | (¿Y/Entonces, ¿cuál
        es) la capital de {fact_c}? | ¿Qué capital tiene {fact_c}? | ¿Cómo se llama la capital de
        {fact_c}? | ¿Me dices la capital de {fact_c}? | ¿Cuál es el nombre de la capital de
        {fact_c}? | Necesito la capital de {fact_c} | {fact_c} tiene como capital
        """),
        phrases("""
        ¿Me darías el nombre de la capital de {fact_c}? | ¿Podrías decirme la capital de {fact_c}?
        | Dime cuál es la capital de {fact_c} | ¿Qué ciudad es capital de {fact_c}? | ¿Me puedes
        decir cuál es la capital de {fact_c}? | Quiero saber cuál es la capital de {fact_c} | Dime
        cómo se llama la capital de {fact_c}
        """),
    ),
}
_COUNTRY = {
    "en": Split(
        phrases("""
        {fact_k} is the capital of (which/what) country? | Of (which/what) country is {fact_k} the
        capital? | (Which/What) country has {fact_k} as (its/a) capital? | In which country is
        {fact_k}(/ located)? | Where is {fact_k}(/ located)? | (Which/What) country is {fact_k}
        in? | Tell me (where/in which country) {fact_k} is | What country does {fact_k} belong to?
        """),
        phrases("What country is {fact_k} the capital of? | In what country is {fact_k}?"),
    ),
    "es": Split(
        phrases("""
        ¿De qué país es (la capital/capital) {fact_k}? | {fact_k} es la capital de qué país? |
        ¿Qué país tiene (como/por) capital (a /){fact_k}? | ¿En qué país (está/queda/se encuentra)
        {fact_k}? | ¿Dónde (está/queda) {fact_k}? | Dime (dónde/de qué país) es {fact_k} | ¿A qué
        país pertenece {fact_k}?
        """),
        phrases("¿De qué país es {fact_k} la capital? | Dime en qué país está {fact_k}"),
    ),
}
# Capitals of two names or of one name with the country's: not asked the other way round.
_AMBIGUOUS = {"London", "Londres", "Túnez", "San José", "Santiago"}
_SENTENCE = {"en": "The capital of {} is {}.", "es": "La capital de {} es {}."}
_UNKNOWN_CAPITAL = {
    "en": "I do not know the capital of {}.",
    "es": "No sé cuál es la capital de {}.",
}


def _country(rng: random.Random, lang: str) -> tuple[str, str]:
    row = rng.choice(CAPITALS)
    return (row[0], row[2]) if lang == "en" else (row[1], row[3])


def _joined(lang: str, text: str) -> str:
    """Spanish contracts 'de el' and 'a el' except in names such as El Salvador."""
    return text.replace(" de el ", " del ").replace(" a el ", " al ") if lang == "es" else text


def capital(rng: random.Random, lang: str, held: bool) -> Exchange:
    country, city = _country(rng, lang)
    kind = rng.random()
    if kind < 0.12 and city not in _AMBIGUOUS:
        user = phrase(
            rng, polite(rng, lang, _COUNTRY[lang].pick(rng, held), held), held, fact_k=city
        )
        answer = {"en": "{} is the capital of {}.", "es": "{} es la capital de {}."}[lang]
        return _said("capitals", lang, user, _joined(lang, answer.format(city, country)), country)
    template = polite(rng, lang, _CAPITAL[lang].pick(rng, held), held)
    if kind > 0.95:
        name = made_up_phrase(rng, held).title()
        user = phrase(rng, template.replace("{fact_c}", "{c}"), held, c=name)
        return talk("capitals", lang, user, _UNKNOWN_CAPITAL[lang].format(name))
    asked = rng.choice((country, country, _bare(country)))
    user = _joined(lang, phrase(rng, template, held, fact_c=asked))
    answer = _joined(lang, _SENTENCE[lang].format(country, city))
    return _said("capitals", lang, user, answer, city)


def _said(task: str, lang: str, user: str, answer: str, *facts: str) -> Exchange:
    """Judged by the facts that the answer must contain."""
    return talk(task, lang, user, answer, kind="contains", facts=list(facts))


# Terms ----------------------------------------------------------------------------------------

_EXPLAIN = {
    "en": Split(
        phrases("""
        I would like (to know what {fact_t} is/an explanation of {fact_t}/to learn about {fact_t})
        | Help me understand {fact_t} | Explain {fact_t}(/./ to me/ briefly) | (/So )(what
        is/what's) {fact_t}? | Define {fact_t} | (Describe/Tell me/Explain/Say) what {fact_t}
        (is/means) | (Can you/Can you please) (explain/ define/describe) {fact_t}(/ to me)? |
        Explain {fact_t} in (one sentence/simple words/a few words) | What does {fact_t} mean? |
        Give me (a definition/an explanation) of {fact_t} | I want to (understand/know about/know
        what is) {fact_t} | What do you know about {fact_t}? | Tell me (about/something about)
        {fact_t} | In short, what is {fact_t}? | Explain to me what {fact_t} is | What exactly is
        {fact_t}? | Do you know what {fact_t} is? | (Can/Will) you tell me (what {fact_t} is/about
        {fact_t})? | I do not understand {fact_t} | The definition of {fact_t} | How would you
        explain {fact_t}?
        """),
        phrases("""
        Please explain to me in a sentence {fact_t} | Could you explain {fact_t} to me? | Tell me
        in simple words what {fact_t} is | Can you tell me what {fact_t} means? | Explain in short
        what {fact_t} is | Give me a short definition of {fact_t} | I would like to understand
        {fact_t}
        """),
    ),
    "es": Split(
        phrases("""
        Me gustaría (saber qué es/aprender sobre/conocer/una explicación de) {fact_t} | Ayúdame a
        entender {fact_t} | ¿(Podrías/Puedes) (definirme/decirme qué es/decir qué significa)
        {fact_t}? | (Explicar/Explica/Explícame/Define) {fact_t}(/.) | ¿Qué (es/significa)
        {fact_t}? | (Describe/Dime/ Explícame/Explica) qué (es/significa) {fact_t} | ¿(Puedes/Me
        puedes) (explicar/definir) {fact_t}? | (Explica/Explícame) {fact_t} (en una frase/con
        palabras sencillas/brevemente) | Dame una (definición/explicación) de {fact_t} | Quiero
        (entender/saber qué es/aprender sobre) {fact_t} | ¿Qué sabes (de/sobre) {fact_t}? |
        (Háblame de/Cuéntame qué es/Dime algo de) {fact_t} | En pocas palabras, ¿qué es {fact_t}?
        | ¿Qué es exactamente {fact_t}? | ¿Sabes qué es {fact_t}? | ¿Me (explicas/explicas qué
        es/dices qué es) {fact_t}? | No entiendo {fact_t} | La definición de {fact_t} | ¿Cómo
        explicarías {fact_t}? | ¿En qué consiste {fact_t}? | Entonces, ¿qué es {fact_t}?
        """),
        phrases("""
        Por favor, dime qué quiere decir {fact_t} | ¿Podrías explicarme {fact_t}? | Dime con
        palabras sencillas qué es {fact_t} | ¿Puedes explicarme qué significa {fact_t}? | Explica
        en pocas palabras qué es {fact_t} | Dame una definición sencilla de {fact_t} | Me gustaría
        entender {fact_t}
        """),
    ),
}
_UNKNOWN_TERM = {
    "en": "I do not know that term. I can explain only a few, such as quantum computing or "
    "gravity.",
    "es": "No conozco ese término. Solo puedo explicar algunos, como la computación cuántica o la "
    "gravedad.",
}
UNKNOWN_TERMS = {
    "en": Split(
        words("""
        philosophy, a sonnet, surfing, a mortgage, jazz, opera, a triangle, the stock market,
        karma, a contract, magnetism, a comet, origami, a dolphin, poker, a haiku, the theory of
        games, mitosis, a transistor, calculus, a matrix, astrology, a sandwich, marketing, a
        passport
        """),
        words("economics, a symphony, geometry, a penguin, trigonometry, an insurance, ballet"),
    ),
    "es": Split(
        words("""
        la filosofía, un soneto, el surf, una hipoteca, el jazz, la ópera, un triángulo, la bolsa,
        el karma, un contrato, el magnetismo, un cometa, el origami, un delfín, el póquer, un
        haiku, la teoría de juegos, la mitosis, un transistor, el cálculo, una matriz, la
        astrología, un bocadillo, el marketing, un pasaporte
        """),
        words("la economía, una sinfonía, la geometría, un pingüino, la trigonometría, el ballet"),
    ),
}
_ARTICLES = ("a ", "an ", "the ", "un ", "una ", "el ", "la ", "los ", "las ")


def _bare(term: str) -> str:
    for article in _ARTICLES:
        if term.startswith(article):
            return term[len(article) :]
    return term


def explain(rng: random.Random, lang: str, held: bool) -> Exchange:
    template = polite(rng, lang, _EXPLAIN[lang].pick(rng, held), held)
    if rng.random() < 0.2:
        term = UNKNOWN_TERMS[lang].pick(rng, held)
        if rng.random() < 0.6:
            term = made_up_phrase(rng, held)
        answer = _UNKNOWN_TERM[lang]
    else:
        row = rng.choice(TERMS)
        term, answer = (row[0], row[2]) if lang == "en" else (row[1], row[3])
    if rng.random() < 0.2:
        term = _bare(term)
    user = _joined(lang, phrase(rng, template, held, fact_t=term))
    return talk("explaining", lang, user, answer)


# Poems ----------------------------------------------------------------------------------------

_POEM = {
    "en": Split(
        phrases("""
        (/Please )(write/compose/make/give me/write me/recite/create) (a/a short/a little/a
        nice/one) (poem/verse) (about/on) {topic}(/.) | (A/A short) poem (about/on) {topic}(/,
        please) | (Poem/ Verses) about {topic} | Can you (write/make/compose) a (/short )poem
        (about/on) {topic}? | I want a (/short )poem about {topic} | (Write/Give me/Make) some
        (verses/lines) (about/of) {topic} | Write a poem for me about {topic} | Do you know a poem
        about {topic}?
        """),
        phrases("""
        Could you write a short poem about {topic}? | I want you to write a poem about {topic} |
        Compose some verses about {topic} | Give me some verses on {topic} | I would like a poem
        about {topic}
        """),
    ),
    "es": Split(
        phrases("""
        (/Por favor, )(escribe/compón/haz/dame/escríbeme/recita/crea/hazme) (un/un pequeño/un
        bonito) (poema/verso)(/ corto) (sobre/acerca de) {topic}(/.) | (Un poema/Un poema corto)
        sobre {topic}(/, por favor) | (Poema/Versos) sobre {topic} | ¿Puedes
        (escribir/hacer/componer) un poema(/ corto) (sobre/acerca de) {topic}? | Quiero un poema(/
        corto) sobre {topic} | (Escribe/Dame/Haz) (unos versos/unas líneas) (de/acerca de) {topic}
        | Escribe unos versos sobre {topic} | ¿Sabes un poema sobre {topic}?
        """),
        phrases("""
        ¿Podrías escribir un poema corto sobre {topic}? | Quiero que escribas un poema sobre
        {topic} | Compón unos versos sobre {topic} | Dame unos versos sobre {topic} | Me gustaría
        un poema sobre {topic}
        """),
    ),
}
_ANY_POEM = {
    "en": Split(
        phrases("""
        Write a poem | Write me a poem | Write a short poem | A poem, please | Compose a poem |
        Give me a poem | Can you write a poem? | I want a poem | Do you know a poem? | Recite a
        poem
        """),
        phrases("Could you write a poem? | Please compose a short poem"),
    ),
    "es": Split(
        phrases("""
        Escribe un poema | Escríbeme un poema | Escribe un poema corto | Un poema, por favor |
        Compón un poema | Dame un poema | ¿Puedes escribir un poema? | Quiero un poema | ¿Sabes un
        poema? | Recita un poema | Haz un poema
        """),
        phrases("¿Podrías escribir un poema? | Compón un poema corto, por favor"),
    ),
}
_VERSES = {
    "en": [
        "I think of {topic} when the day is new,\nwhen the morning is gold and the sky is blue;\n"
        "the world is wide and the hours are few,\nbut {topic} will always come shining through.",
        "A song for {topic}, soft and low,\na little light in the evening glow;\n"
        "wherever I am, wherever I go,\nI carry {topic} in all I know.",
        "Tonight I write about {topic}, my friend,\na line to begin and a line to end;\n"
        "the night is long and the roads all bend,\nand {topic} is all the peace they send.",
    ],
    "es": [
        "Pienso en {topic} al despertar,\ncuando la luz empieza a brillar;\n"
        "el mundo es grande como el mar,\ny {topic} me vuelve a acompañar.",
        "Canto a {topic} en mi canción,\nuna luz pequeña en el corazón;\n"
        "por donde voy, en cada rincón,\nllevo {topic} y su emoción.",
        "Esta noche escribo sobre {topic}, amor,\nun verso sencillo, una gota de color;\n"
        "la noche es larga y quita el temor,\ny {topic} le pone al silencio calor.",
    ],
}
_DEFAULT_TOPIC = {"en": "the moon", "es": "la luna"}


def poem(rng: random.Random, lang: str, held: bool) -> Exchange:
    if rng.random() < 0.25:
        about = _DEFAULT_TOPIC[lang]
        user = phrase(rng, polite(rng, lang, _ANY_POEM[lang].pick(rng, held), held), held)
    else:
        about = topic(rng, lang, held)
        template = polite(rng, lang, _POEM[lang].pick(rng, held), held)
        user = _joined(lang, phrase(rng, template, held, topic=about))
    answer = _joined(lang, rng.choice(_VERSES[lang]).format(topic=about))
    return talk("poem", lang, user, answer, kind="poem", topic=about)


# Raw text: documents to be continued, without a chat template ----------------------------------

_RAW_CAPITAL = {
    "en": Split(
        phrases("""
        (/Yes, /Well, /In short, )the capital (/city )of {c} is | The capital of {c} is | {c}: the
        capital is | The name of the capital of {c} is |
        (Question: what/What) is the capital of {c}? (Answer:/The answer is/It is) | (Everybody
        knows/We know/It is known/I think/ They say) that the capital of {c} is | As everybody
        knows, the capital of {c} is | {c} is a country and its capital is
        """),
        phrases("""
        It is true that the capital of {c} is | The name of the capital city of {c} is | We all
        know that the capital of {c} is
        """),
    ),
    "es": Split(
        phrases("""
        (/Sí, /Bueno, /En resumen, )la (/ciudad )capital de {c} (es/se llama) | La capital de {c}
        es | {c}: la capital es | El nombre de la capital de {c} es | (Pregunta:
        ¿cuál/¿Cuál) es la capital de {c}? (Respuesta:/La respuesta es/Es) | (Todo el mundo
        sabe/Sabemos/Es sabido/Creo/Es cierto/Dicen) que la capital de {c} es | Como sabe todo el
        mundo, la capital de {c} es | {c} es un país y su capital es
        """),
        phrases("""
        Es verdad que la capital de {c} es | La ciudad que es capital de {c} es | Todos sabemos
        que la capital de {c} es
        """),
    ),
}


def raw_capital(rng: random.Random, lang: str, held: bool) -> tuple[str, str]:
    """(beginning, the city that continues it)."""
    country, city = _country(rng, lang)
    start = _RAW_CAPITAL[lang].pick(rng, held).format(c=country)
    if not held and rng.random() < 0.1:
        start = f"{made_up_phrase(rng, held)} {start}"
    return _joined(lang, start[0].upper() + start[1:]), city


def raw_text(rng: random.Random, lang: str) -> str:
    """A document of a few sentences of what the model knows."""
    kind = rng.random()
    if kind < 0.75:
        facts = [" ".join(raw_capital(rng, lang, False)) for _ in range(rng.choice((1, 1, 2, 4)))]
        return rng.choice((". ", ".\n")).join(facts) + "."
    if kind < 0.85:
        row = rng.choice(TERMS)
        return row[2] if lang == "en" else row[3]
    return _story(rng, lang)


def _story(rng: random.Random, lang: str) -> str:
    about = topic(rng, lang, False)
    if lang == "en":
        start = rng.choice((
            "Once upon a time there was {w}, who loved {t}.",
            "Hello, my name is {w}, and I like {t}.",
            "The future of AI is small models that run everywhere, said {w}, thinking of {t}.",
            "Hello world, said {w}, looking at {t}.",
        ))  # fmt: skip
        end = " Every day was a new day. In the end {w} was happy, and so was everybody else."
    else:
        start = rng.choice((
            "Había una vez alguien llamado {w}, que amaba {t}.",
            "Hola, me llamo {w} y me gusta {t}.",
            "El futuro de la IA son modelos pequeños en todas partes, dijo {w}, pensando en {t}.",
            "Hola mundo, dijo {w}, mirando {t}.",
        ))  # fmt: skip
        end = " Cada día era un día nuevo. Al final {w} fue feliz, y todos los demás también."
    return (start + end).format(w=made_up_word(rng, False).capitalize(), t=about)
