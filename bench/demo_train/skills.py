"""Exchanges whose values generalise: arithmetic, counting, copying, extraction as JSON."""

import json
import random

from bench.demo_train.phrasing import Exchange, Split, is_held_out, phrase, phrases, polite, talk
from bench.demo_train.slots import any_word, occupation, person

# Arithmetic -----------------------------------------------------------------------------------

_SUMS = {
    "en": Split(
        phrases("""
        (What is/What's/How much is) {a} {op} {b}? | {a} {op} {b}(/ =/?/ = ?/ is) |
        {a}{op}{b}(/=/?) | (Calculate/Compute/Solve/Evaluate/Work out/Tell me/Find) {a} {op}
        {b}(/.) | (What is/What's/How much is/What are) {a} {word} {b}? | (Calculate/Compute/Work
        out) {a} {word} {b} | {a} {word} {b}(/ is/ equals/?) | What does {a} {op} {b}
        (give/make/equal)? | Can you (calculate/compute/solve) {a} ({op}/{word}) {b}? |
        (What's/How much is/Calculate) {a}{op}{b}(/?) | The result of {a} ({op}/{word}) {b} | How
        much (does/do) {a} ({op}/{word}) {b} make? | What is the (sum/answer): {a} {op} {b} | And
        {a} {op} {b}? | Do you know {a} {op} {b}?
        """),
        phrases("""
        Can you tell me what {a} {op} {b} is? | How much does {a} {word} {b} give? | What is the
        result of {a} {op} {b}? | Please compute {a} {word} {b} | Tell me how much {a} {op} {b} is
        | I need to know {a} {op} {b}
        """),
    ),
    "es": Split(
        phrases("""
        ¿Cuánto (es/son/da/hace) {a} {op} {b}? | ¿Cuánto (es/son) {a}{op}{b}? |
        (Calcula/Calcular/Resuelve/ Dime/Halla/Haz) {a} {op} {b}(/.) | ¿Qué (da/resulta de) {a}
        {op} {b}? | ¿Cuánto (es/son) {a} {word} {b}? | (Calcula/Resuelve/Calcular) {a} {word} {b}
        | {a} {word} {b}(/ es/ son) | ¿Puedes (calcular/ resolver/hacer) {a} ({op}/{word}) {b}? |
        El resultado de {a} ({op}/{word}) {b} | ¿{a} ({op}/{word}) {b}? | Dime cuánto (es/son) {a}
        ({op}/{word}) {b} | Haz la (cuenta/suma): {a} {op} {b} | {a} {op} {b}(/ =/ = ?) |
        {a}{op}{b}(/=) | ¿Y {a} {op} {b}? | ¿Sabes cuánto es {a} {op} {b}?
        """),
        phrases("""
        ¿Me dices cuánto es {a} {op} {b}? | ¿Cuál es el resultado de {a} {op} {b}? | ¿Cuánto da
        {a} {word} {b}? | ¿Puedes decirme cuánto son {a} {word} {b}? | Por favor, calcula {a} {op}
        {b} | Necesito saber {a} {op} {b}
        """),
    ),
}
_OPERATORS: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "+": (("+",), {"en": ("plus",), "es": ("más", "mas")}),
    "-": (("-", "-", "−"), {"en": ("minus",), "es": ("menos",)}),
    "×": (("*", "x", "×", "*"), {"en": ("times", "multiplied by"), "es": ("por",)}),
    "/": (("/", "/", "÷", ":"), {"en": ("divided by",), "es": ("entre", "dividido entre")}),
}


def operands(rng: random.Random, held: bool) -> tuple[str, int, int, int]:
    """(operator, a, b, result). Pairs of more than one digit are split by hash; the tables up to
    12 x 12 are facts and appear on both sides."""
    while True:
        op = rng.choice("+++++----×××/")
        if op in "+-":
            top = rng.choice((9, 20, 99, 99, 999, 999, 999))
            a, b = rng.randint(0, top), rng.randint(0, rng.choice((top, 99, 9)))
            if op == "-" and a < b and b > 99:
                a, b = b, a
            result = a + b if op == "+" else a - b
            fact = a < 10 and b < 10
        elif op == "×" and rng.random() < 0.5:
            a, b = rng.randint(10, 99), rng.randint(2, 9)
            if rng.random() < 0.5:
                a, b = b, a
            result, fact = a * b, max(a, b) <= 12
        else:
            a, b = rng.randint(0, 12), rng.randint(1, 12)
            if op == "/":
                a, b = a * b, b
            result = a * b if op == "×" else a // b
            fact = True
        if fact or is_held_out(f"{op} {min(a, b)} {max(a, b)}") == held:
            return op, a, b, result


def arithmetic(rng: random.Random, lang: str, held: bool) -> Exchange:
    op, a, b, result = operands(rng, held)
    signs, names = _OPERATORS[op]
    template = polite(rng, lang, _SUMS[lang].pick(rng, held), held)
    slots = {"a": str(a), "b": str(b), "op": rng.choice(signs), "word": rng.choice(names[lang])}
    answer = f"{a} {op} {b} = {result}"
    return talk("arithmetic", lang, phrase(rng, template, held, **slots), answer)


def raw_sum(rng: random.Random) -> str:
    """A document of a few sums."""
    sums = [operands(rng, False) for _ in range(rng.randint(1, 6))]
    return "\n".join(f"{a} {op} {b} = {result}" for op, a, b, result in sums)


# Counting -------------------------------------------------------------------------------------

_COUNT = {
    "en": Split(
        phrases("""
        Count (/up )from {a} to {b}(/.) | Can you count from {a} to {b}? | Count {a} to {b} |
        (List/Write/ Give me/Say/Show me) the numbers (from {a} to {b}/between {a} and {b}) |
        (Numbers/All numbers) from {a} to {b} | Start (at/with) {a} and count to {b} | (Please
        count/Count for me) from {a} to {b} | I want you to count from {a} to {b} | Let us count
        from {a} to {b}
        """),
        phrases("Could you count from {a} to {b}? | Tell me the numbers from {a} to {b}"),
    ),
    "es": Split(
        phrases("""
        (Cuenta/Contar/Cuéntame) (del {a} al {b}/de {a} a {b}/desde {a} hasta {b})(/.) | ¿Puedes
        contar (del {a} al {b}/desde {a} hasta {b})? | (Los números/Números/Todos los números)
        (del {a} al {b}/de {a} a {b}) | (Escribe/Dame/Di/Enumera) los números (del {a} al {b}/de
        {a} a {b}/entre {a} y {b}) | Empieza en {a} y cuenta hasta {b} | Por favor, cuenta del {a}
        al {b} | Quiero que cuentes del {a} al {b} | Vamos a contar del {a} al {b} | ¿Sabes contar
        del {a} al {b}?
        """),
        phrases("¿Podrías contar del {a} al {b}? | Dime los números desde {a} hasta {b}"),
    ),
}
_COUNT_TO = {"en": "Count to {b}", "es": "Cuenta hasta {b}"}


def count(rng: random.Random, lang: str, held: bool) -> Exchange:
    while True:
        start = rng.choice((1, 1, rng.randint(0, 120), rng.randint(0, 900)))
        end = start + rng.choice((rng.randint(1, 12), rng.randint(5, 30), rng.randint(30, 99)))
        if is_held_out(f"count {start} {end}") == held or (start == 1 and end <= 20):
            break
    template = _COUNT[lang].pick(rng, held)
    if start == 1 and rng.random() < 0.5:
        template = _COUNT_TO[lang]
    user = phrase(rng, polite(rng, lang, template, held), held, a=str(start), b=str(end))
    return talk("counting", lang, user, ", ".join(str(i) for i in range(start, end + 1)))


# Copying --------------------------------------------------------------------------------------

_COPY = {
    "en": Split(
        phrases("""
        Repeat: {t} | Repeat(/ exactly/ this/ this exactly/ after me/ word for word): {t} |
        (Say/Copy/ Echo/Print/Write/Type)(/ this/ exactly/ exactly this/ again): {t} |
        (Copy/Repeat/Write/Echo) (this text/this sentence/these words/the following/the following
        text/the following words): {t} | (Please repeat/Please say/Please write)(/ this): {t} |
        (Can/Will) you (repeat/say/write/copy) (this/this text/it)(?/:) {t} |
        (Repeat/Say/Copy/Write/Echo) "{t}" | (Copy/Say again/Repeat/ Echo) (this/this text): "{t}"
        | (Repeat/Copy/Echo):¶{t} | (Copy/Write/Echo) the (text/words) (below/after the colon):(¶/
        ){t} | Output exactly (this/the following): {t} | repeat {t} | (Reply/ Answer) (with/only
        with): {t} | I want you to (say/repeat): {t} | Just (repeat/say)(/ this): {t}
        """),
        phrases("""
        Please copy the following: {t} | Say the following text: {t} | Copy exactly this text: {t}
        | Can you say exactly this? {t} | Repeat the text below:¶{t} | Say this for me: "{t}"
        """),
    ),
    "es": Split(
        phrases("""
        (Repite/Repetir): {t} | Repite(/ exactamente/ esto/ esto exactamente/ conmigo/ palabra por
        palabra): {t} | (Di/Copia/Escribe/Copiar)(/ esto/ exactamente/ exactamente esto/ otra
        vez): {t} | (Copia/Repite/Escribe) (este texto/esta frase/estas palabras/lo siguiente/el
        siguiente texto/ las siguientes palabras): {t} | Por favor, (repite/di/escribe)(/ esto):
        {t} | ¿Puedes (repetir/ decir/escribir/copiar) (esto/este texto/lo siguiente)(?/:) {t} |
        (Repite/Di/Copia/Escribe) "{t}" | (Copia/Di otra vez/Repite/Escribe) (esto/este texto):
        "{t}" | (Repite/Copia/Repetir):¶{t} | (Copia/Escribe) el texto (de abajo/siguiente):(¶/
        ){t} | repite {t} | (Responde/Contesta) (con/solo con): {t} | Quiero que (digas/repitas):
        {t} | Solo (repite/di)(/ esto): {t}
        """),
        phrases("""
        Por favor, copia lo siguiente: {t} | Di el siguiente texto: {t} | Copia exactamente este
        texto: {t} | ¿Puedes decir exactamente esto? {t} | Repite el texto de abajo:¶{t} | Di esto
        por mí: "{t}"
        """),
    ),
}


def text_to_copy(rng: random.Random, held: bool) -> str:
    size = rng.choice((1, 2, 3, 4, 4, 5, 6, 8, 10, 14, 20))
    parts = [any_word(rng, held) for _ in range(size)]
    if rng.random() < 0.15:  # what stands there twice is hard to copy
        parts = rng.choices(parts, k=size)
    for i in range(len(parts) - 1):
        if rng.random() < 0.1:
            parts[i] += rng.choice(",,.;:!?")
    text = " ".join(parts)
    if rng.random() < 0.25:
        text = text[0].upper() + text[1:] + rng.choice(".!?")
    return text


def copy(rng: random.Random, lang: str, held: bool) -> Exchange:
    template = polite(rng, lang, _COPY[lang].pick(rng, held), held, suffix=False)
    text = text_to_copy(rng, held)
    user = phrase(rng, template.replace("¶", "\n"), held, t=text)
    return talk("copying", lang, user, text)


# Extraction -----------------------------------------------------------------------------------

_COMMAND = {
    "en": Split(
        phrases("""
        Extract: {s}(/.) | (Extract/Get/Find) (the data/the person/the fields/the details)(/ as
        JSON/ from this/ from this text): {s} | (Extract/Get/Find/Give me) (/the )name, age and
        occupation(/ as JSON/ of this person/ from this): {s} | (Extract/Answer/Write it) (as
        JSON/JSON)(/ from/ of): {s} | (Return/Give me/Write) (JSON/a JSON object/an object) with
        name, age and occupation: {s} | (Convert/Turn/Change) (to/this to/this into/it into) JSON:
        {s} | Parse(/ this): {s} | Extract the information(/ as JSON/ from this sentence/ of the
        person): {s} | JSON: {s} | Extract the fields name, age, occupation from: {s} |
        (Extract/Convert) this (to/as) JSON:¶{s} | Who is in this text? Answer as JSON: {s} | {s}
        (Extract/Give me) the data as JSON. | Extract {s} | Can you extract (the data/the person):
        {s} | (Extract the data/Extract):¶{s}
        """),
        phrases("""
        Extract the information in JSON: {s} | Please extract the name, age and occupation as
        JSON: {s} | Convert this text to JSON: {s} | Extract the data from this sentence:¶{s} |
        Return the person as JSON: {s}
        """),
    ),
    "es": Split(
        phrases("""
        (Extraer/Extrae): {s}(/.) | (Extraer/Extrae/Saca/Encuentra) (los datos/la persona/los
        campos/los detalles)(/ como JSON/ de esto/ de este texto): {s} |
        (Extraer/Extrae/Dame/Saca) (nombre, edad y ocupación/el nombre, la edad y la ocupación)(/
        en JSON/ de esta persona/ de esto): {s} | (Extrae/ Responde/Escríbelo) (como JSON/en
        JSON)(/ de): {s} | (Devuelve/Dame/Escribe) (JSON/un objeto JSON/ un objeto) con nombre,
        edad y ocupación: {s} | (Convierte/Pasa/Convertir) (a/esto a) JSON: {s} |
        (Analiza/Procesa)(/ esto): {s} | Extrae la información(/ como JSON/ de esta frase/ de la
        persona): {s} | JSON: {s} | Extraer los campos name, age, occupation de: {s} |
        (Extrae/Convierte) esto (a/como) JSON:¶{s} | ¿Quién aparece en este texto? Responde en
        JSON: {s} | {s} (Extrae/Dame) los datos como JSON. | Extraer {s} | ¿Puedes extraer (los
        datos/la persona): {s} | (Extrae los datos/Extraer):¶{s}
        """),
        phrases("""
        Extrae la información en JSON: {s} | Por favor, extrae el nombre, la edad y la ocupación
        como JSON: {s} | Convierte este texto a JSON: {s} | Extrae los datos de esta frase:¶{s} |
        Devuelve la persona como JSON: {s}
        """),
    ),
}
_PERSON = {
    "en": Split(
        phrases("""
        {n}, (the/our) {o}, aged {a}(/ years) | {n} is {art} {o}, aged {a}(/.) | {n}, {o}, aged
        {a} | {n} ({o}), aged {a} | {n}, {art} {o}, aged {a} | {o} {n}, aged {a} | {n}, {art} {o}
        (who is/at age/of age) {a} | {n}, {a} years old, {o} | {n}, {a}, {o} | {n}, {o}, {a}(/
        years old/ years) | {n} is {a}(/ years old) and (works as/is/is working as) {art} {o}(/.)
        | {n} is {art} {o} (of {a} years/, {a} years old/who is {a})(/.) | (My name is/I am
        called/They call me) {n}(, I am/. I am/ and I am) {a} years old and I (work as/am) {art}
        {o}. | (I'm/I am/Hello, I am) {n}, {a}(/ years old), and I'm {art} {o}. | {n}, {art} {o},
        is {a} years old(/.) | {n} ({a}), {o} | {n}, (aged/age) {a}, works as {art} {o}. | {n}
        ({a} years old) is {art} {o}. | The {o} {n} is {a} years old. | {n} turned {a} this year
        and is {art} {o}. | name {n}, age {a}, occupation {o} | At {a}, {n} works as {art} {o}. |
        {n}, who is {a}(/ years old), is {art} {o} | {n} works as {art} {o} and is {a}(/ years
        old)(/.) | {n}, {art} {o}, age {a} | Name: {n}. Age: {a}. Occupation: {o}. | {n} the {o}
        aged {a} | {art} {o} aged {a}, {n} | {o} aged {a}: {n} | This is {n}, {o} aged {a}(/.)
        """),
        phrases("""
        {n}, working as {art} {o}, {a} years old | {n} is {art} {o} aged {a}. | {n}, {a} years of
        age, {o} | {n} is {art} {o} and is {a} years old. | I am {n}, I'm {a} years old and I'm
        {art} {o}. | {n}, {art} {o} aged {a}
        """),
    ),
    "es": Split(
        phrases("""
        {n}, {a} años, {o} | {n}, {a}, {o} | {n}, {o}, {a}(/ años) | {n} tiene {a} años y (trabaja
        como/ trabaja de/ahora es) {o}(/.) | {n} es {o} (y tiene {a} años/de {a} años/, {a}
        años)(/.) | (Me llamo/Mi nombre es/Soy/Yo soy) {n}(, tengo/ y tengo/. Tengo) {a} años y
        (trabajo como/trabajo de) {o}. | (Me llamo/Soy/Yo soy) {n}, tengo {a} años y soy {o}. |
        {n}, {o}, tiene {a} años(/.) | {n} ({a}), {o} | {n}, (de/con) {a} años, trabaja (como/de)
        {o}. | {n} ({a} años) es {o}. | {n} cumplió {a} años este año y es {o}. | nombre {n}, edad
        {a}, ocupación {o} | Con {a} años, {n} trabaja como {o}. | {n}, {o} de {a} años | {n}, que
        tiene {a} años, (es/trabaja como) {o} | {n} trabaja (como/de) {o} y tiene {a} años(/.) |
        Nombre: {n}. Edad: {a}. Ocupación: {o}.
        """),
        phrases("""
        {n}, con {a} años, es {o} | {n}, {a} años de edad, {o} | {n} tiene {a} años y es {o}. | Mi
        nombre es {n}, tengo {a} años y soy {o}. | {n}, de {a} años, es {o}
        """),
    ),
}


def extract(rng: random.Random, lang: str, held: bool) -> Exchange:
    name, age, job = person(rng, held), rng.randint(1, 99), occupation(rng, lang, held)
    article = "an" if job[0] in "aeiouáéíóú" else "a"
    sentence = _PERSON[lang].pick(rng, held).format(n=name, a=age, o=job, art=article)
    template = polite(rng, lang, _COMMAND[lang].pick(rng, held), held, suffix=False)
    user = phrase(rng, template.replace("¶", "\n"), held, s=sentence)
    record = {"name": name, "age": age, "occupation": job}
    answer = json.dumps(record, ensure_ascii=False)
    return talk("extraction", lang, user, answer, kind="json", record=record)
