"""Speed problems, worked out between <think> and </think> before the answer.

The steps are small enough for a tiny model: a division is done digit by digit with remainders, and
km/h become m/s by a table known by heart (every whole speed to 250 km/h). Numbers divide evenly.
"""

import random

from bench.demo_train.phrasing import (
    Exchange,
    Split,
    is_held_out,
    phrase,
    phrases,
    polite,
    talk,
    words,
)

_TIMES = (0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9, 10)
_MINUTES = {10: 6, 15: 4, 20: 3, 30: 2}
_UNITS = {"en": ("m/s", "m/s", "meters per second"), "es": ("m/s", "m/s", "metros por segundo")}
_KMH = {"en": ("km/h", "km/h", "kilometers per hour"), "es": ("km/h", "kilómetros por hora")}
_VEHICLES = {
    "en": Split(
        words("""
        a train, a car, a bus, a plane, a ship, a cyclist, a truck, a bicycle, a runner, a boat, a
        horse, a taxi, a motorcycle, an airplane, the train, the car, my car, Ana, John
        """),
        words("a tram, a van, an ambulance, a helicopter, a scooter, the bus"),
    ),
    "es": Split(
        words("""
        un tren, un coche, un autobús, un avión, un barco, un ciclista, un camión, una bicicleta,
        un corredor, un auto, un caballo, un taxi, una moto, el tren, el coche, mi coche, Ana,
        Juan
        """),
        words("""
        un tranvía, una furgoneta, una ambulancia, un helicóptero, un patinete, el autobús
        """),
    ),
}
_PREFIXES = {
    "en": Split(
        phrases("""
        (Solve/Problem/Calculate/Exercise/Compute/Answer/Task): | Solve (this/this problem/it/the
        exercise): | Help me (solve/with) this: | Think (step by step/about this): | A problem:
        """),
        phrases("Please solve: | Solve the problem: | Solve this for me:"),
    ),
    "es": Split(
        phrases("""
        (Resolver/Resuelve/Problema/Ejercicio/Calcular/Responde/Tarea): | Resuelve (esto/este
        problema/el ejercicio): | Ayúdame (a resolver/con) esto: | Piensa (paso a paso/en esto): |
        Un problema:
        """),
        phrases("Por favor, resuelve: | Resuelve el problema: | Resuélveme esto:"),
    ),
}
_SPEED = {
    "en": Split(
        phrases("""
        If {v} (travels/goes/drives/moves/runs) {d} in {t}, what is (its/the/the average) speed in
        {u}? | {V} (travels/covers/goes/moves/does) {d} in {t}. (What is its speed/What is the
        speed/How fast is it/How fast does it go/Give the speed) in {u}(?/.) | What is the speed
        in {u} of {v} that (travels/covers/goes/does) {d} in {t}? | (How fast is/What speed has)
        {v} that (goes/covers) {d} in {t}, in {u}? | {V} (needs/takes/has) {t} for {d}. (What is
        its speed/How fast is it) in {u}? | If {v} (covers/does/runs) {d} in {t}, how fast (is
        it/does it go) in {u}? | {d} in {t}: (what is the speed/how fast is that/speed) in {u}? |
        Speed in {u} of {v} (covering/that does) {d} in {t}? | {V} (drives/covers/travels) {d} in
        {t}. (Calculate/Find/Compute) the speed in {u}. | In {t} {v} (travels/covers/goes) {d}.
        What is its speed in {u}? | (Calculate/Find/ Compute) the speed of {v} in {u}: {d} in {t}
        | How many {u} (is/are) {d} in {t}?
        """),
        phrases("""
        If {v} covers {d} in {t}, what is the speed in {u}? | {V} travels {d} in {t}. How fast is
        that in {u}? | What is the speed of {v} in {u} if it goes {d} in {t}? | Calculate the
        speed in {u} of {v} that covers {d} in {t} | In {t}, {v} does {d}. How fast is it in {u}?
        """),
    ),
    "es": Split(
        phrases("""
        Si {v} (viaja/hace/va/corre/avanza) {d} en {t}, ¿cuál es (su velocidad/la velocidad media)
        en {u}? | {V} (viaja/hace/avanza/cubre) {d} en {t}. (¿Cuál es su velocidad/¿Cuál es la
        velocidad/ ¿A qué velocidad va/¿Cómo de rápido va) en {u}? | ¿(Cuál es la/Qué) velocidad
        en {u} (de/tiene) {v} que (viaja/recorre/hace) {d} en {t}? | ¿(Qué velocidad lleva/A qué
        velocidad va) {v} que (hace/recorre) {d} en {t}, en {u}? | {V} (necesita/tarda) {t} para
        {d}. ¿Cuál es su velocidad en {u}? | Si {v} (hace/viaja/cubre) {d} en {t}, ¿(qué velocidad
        lleva/a qué velocidad va) en {u}? | {d} en {t}: ¿(cuál es la velocidad/qué velocidad es)
        en {u}? | Velocidad en {u} de {v} que (recorre/hace) {d} en {t} | {V} (tarda/necesita) {t}
        en recorrer {d}. (Calcula/Halla) la velocidad en {u}. | En {t} {v} (recorre/viaja/hace)
        {d}. ¿Cuál es su velocidad en {u}? | (Calcula/Halla) la velocidad de {v} en {u}: {d} en
        {t} | ¿Cuántos {u} son {d} en {t}?
        """),
        phrases("""
        Si {v} recorre {d} en {t}, ¿cuál es la velocidad en {u}? | {V} viaja {d} en {t}. ¿Qué
        velocidad lleva en {u}? | ¿Cuál es la velocidad de {v} en {u} si hace {d} en {t}? |
        Calcula la velocidad en {u} de {v} que recorre {d} en {t} | En {t}, {v} hace {d}. ¿A qué
        velocidad va en {u}?
        """),
    ),
}
_DISTANCE = {
    "en": Split(
        phrases("""
        If {v} (travels/drives/moves) at {s} for {t}, (how far does it go/what is the distance/how
        many kilometers does it go)? | {V} (goes/moves/runs) at {s} for {t}. (How many kilometers
        does it travel/How far is that/What distance does it cover)? | How far does {v}
        (go/get/travel) in {t} at {s}? | {V} (travels/drives) for {t} at {s}. (What distance does
        it cover/How far does it go)? | What distance does {v} (cover/travel) in {t} at {s}? | How
        far is {s} for {t}? | {t} at {s}: (how far/what distance) is that? | How many kilometers
        (are/is) {t} at {s}?
        """),
        phrases(
            "If {v} goes at {s} for {t}, what distance does it cover? | How far is {t} at {s}?"
        ),
    ),
    "es": Split(
        phrases("""
        Si {v} (viaja/avanza/corre) a {s} durante {t}, ¿(qué distancia recorre/cuál es la
        distancia/ cuántos kilómetros recorre)? | {V} (va/avanza/corre) a {s} durante {t}.
        ¿(Cuántos kilómetros recorre/Qué distancia hace/Qué distancia es)? | ¿Qué distancia
        (recorre/hace) {v} en {t} a {s}? | {V} viaja (durante {t} a {s}/a {s} {t}). ¿(Qué
        distancia recorre/Cuántos kilómetros hace)? | ¿Cuántos kilómetros (hace/recorre) {v} en
        {t} a {s}? | {t} a {s}: ¿(qué distancia/cuántos kilómetros) (es/son)? | ¿Qué distancia es
        ir a {s} durante {t}? | ¿Cuántos kilómetros son {t} a {s}?
        """),
        phrases("""
        Si {v} va a {s} durante {t}, ¿cuántos kilómetros hace? | ¿Qué distancia es {t} a {s}?
        """),
    ),
}
_DURATION = {
    "en": Split(
        phrases("""
        How long does {v} (need/take) for {d} at {s}? | {V} (travels/covers/drives) {d} at {s}.
        How long does it (take/need)? | If {v} (goes/covers) {d} at {s}, (how many hours/how long)
        does it (take/need)? | How many hours does {v} (need/take) for {d} at {s}? | How
        (long/many hours) is a (trip/way/journey) of {d} at {s}? | {d} at {s}: how (long/many
        hours) is that? | How long is {d} at {s}? | (What time does {v} need/How much time) for
        {d} at {s}?
        """),
        phrases("""
        {V} goes {d} at {s}. How many hours does it need? | How long does {d} take at {s}?
        """),
    ),
    "es": Split(
        phrases("""
        ¿Cuánto (tarda/necesita) {v} (en recorrer/para) {d} a {s}? | {V} (viaja/hace) {d} a {s}.
        ¿Cuánto (tarda/dura el viaje)? | Si {v} (recorre/hace/viaja) {d} a {s}, ¿(cuántas
        horas/cuánto) tarda? | ¿Cuántas horas (necesita/tarda) {v} (para/en) {d} a {s}? | ¿Cuánto
        (dura/es) un (viaje/camino) de {d} a {s}? | {d} a {s}: ¿(cuánto tarda/cuántas horas son)?
        | ¿Cuántas horas son {d} a {s}? | ¿Cuánto tiempo (son/lleva) {d} a {s}?
        """),
        phrases("""
        {V} recorre {d} a {s}. ¿Cuántas horas necesita? | ¿Cuánto se tarda en {d} a {s}?
        """),
    ),
}
_CONVERT = {
    "en": Split(
        phrases("""
        (Convert/Change/Turn) {s} (to/into/in) {u} | How (much/fast) is {s} in {u}? | {s} in
        {u}(/?) | What is {s} in {u}? | {s} to {u} | {s} = ? {u} | What is the speed of {s} in
        {u}? | How many {u} is {s}? | (Express/Give/Write) {s} in {u} | I want {s} in {u} | How
        many {u} (make/has) {s}?
        """),
        phrases("Please convert {s} into {u} now | How many {u} are {s}? | Tell me {s} in {u}"),
    ),
    "es": Split(
        phrases("""
        (Convierte/Cambia/Pasa/Convertir) {s} a {u} | ¿Cuánto (es/son) {s} en {u}? | {s} en {u} |
        ¿{s} en {u}? | {s} a {u} | {s} = ? {u} | ¿Cuál es la velocidad de {s} en {u}? | ¿Cuántos
        {u} (es/hay en/hacen) {s}? | (Expresa/Da/Escribe) {s} en {u} | Quiero {s} en {u}
        """),
        phrases("Por favor, convierte {s} en {u} | ¿Cuántos {u} son {s}? | Dime {s} en {u}"),
    ),
}
_ANSWERS = {
    "en": {"speed": "The speed is {}.", "way": "The distance is {}.", "time": "It takes {}."},
    "es": {"speed": "La velocidad es {}.", "way": "La distancia es {}.", "time": "Tarda {}."},
}


def number(value: float) -> str:
    """At most one decimal, none when it is zero."""
    return f"{value:.1f}".removesuffix(".0")


def _distance(rng: random.Random, lang: str, km: int) -> str:
    long = "kilometers" if lang == "en" else "kilómetros"
    return rng.choice((f"{km} km", f"{km}km", f"{km} {long}"))


def _duration(rng: random.Random, lang: str, hours: float) -> str:
    text = number(hours)
    if "." in text and rng.random() < 0.3:
        text = text.replace(".", ",")
    if lang == "en":
        return rng.choice(
            (f"{text} h", f"{text}h") + (f"{text} {'hour' if hours == 1 else 'hours'}",) * 3
        )
    return rng.choice(
        (f"{text} h", f"{text}h") + (f"{text} {'hora' if hours == 1 else 'horas'}",) * 3
    )


def _pair(rng: random.Random, held: bool, kind: str) -> tuple[int, float]:
    """A whole speed in km/h and a time in hours whose product is whole."""
    while True:
        hours = rng.choice(_TIMES)
        if kind == "speed":
            speed = rng.randint(2, rng.choice((60, 130, 250)))
        elif hours in (0.5, 1.5, 2.5):
            speed = 10 * rng.randint(1, 12)
        else:
            hours, speed = rng.randint(1, 9), rng.randint(5, 130)
        if kind == "time":
            hours, speed = rng.randint(1, 12), 10 * rng.randint(1, 12)
        if speed * hours == int(speed * hours) and is_held_out(f"{kind} {speed} {hours}") == held:
            return speed, hours


def long_division(dividend: int, divisor: int) -> str:
    """Digit by digit: `510 / 6` -> `51 / 6 = 8 r 3, 30 / 6 = 5 r 0`."""
    steps: list[str] = []
    rest = 0
    for digit in str(dividend):
        rest = rest * 10 + int(digit)
        quotient, after = divmod(rest, divisor)
        if quotient or steps:
            steps.append(f"{rest} / {divisor} = {quotient} r {after}")
        rest = after
    return ", ".join(steps)


def _divide_steps(km: int, hours: float, speed: int) -> str:
    dividend, divisor = km, int(hours)
    text = f"{km} km / {number(hours)} h"
    if divisor != hours:
        dividend, divisor = 2 * km, int(2 * hours)
        text += f" = {dividend} / {divisor}"
    if divisor == 1:
        return f"{text} = {speed} km/h"
    return f"{text}\n{long_division(dividend, divisor)}\n= {speed} km/h"


def _product(factor: int, by: int) -> list[str]:
    """The lines of `factor` × `by` (one digit), digit by digit, without the result."""
    places = range(len(str(factor)) - 1, -1, -1)
    parts = [factor // 10**i % 10 * 10**i for i in places]
    products = [part * by for part in parts if part]
    if len(products) < 2:
        return []
    lines = [" + ".join(f"{part} × {by}" for part in parts if part), " + ".join(map(str, products))]
    if len(products) == 3:
        lines.append(f"{products[0] + products[1]} + {products[2]}")
    return lines


def _multiply_steps(speed: int, hours: float, km: int) -> str:
    whole, lines = int(hours), []
    if hours == 0.5:
        lines = [f"{speed} / 2"]
    elif hours != whole:
        lines = [f"{speed} × {whole} + {speed} / 2", f"{speed * whole} + {speed // 2}"]
    elif whole > 1:
        lines = _product(speed, whole)
    return "\n= ".join([f"{speed} km/h × {number(hours)} h", *lines, f"{km} km"])


def speed_problem(rng: random.Random, lang: str, held: bool) -> Exchange:
    kind = rng.choices(("speed", "minutes", "way", "time", "convert"), (60, 8, 12, 10, 10))[0]
    if kind == "speed":
        parts = _speed_parts(rng, lang, held)
    elif kind == "minutes":
        parts = _minutes_parts(rng, lang, held)
    elif kind == "convert":
        parts = _convert_parts(rng, lang, held)
    else:
        parts = _other_parts(rng, lang, held, kind)
    templates, slots, steps, quantity, answer = parts
    vehicle = _VEHICLES[lang].pick(rng, held)
    slots |= {"v": vehicle, "V": vehicle[0].upper() + vehicle[1:]}
    template = templates[lang].pick(rng, held)
    if rng.random() < 0.5:
        template = f"{_PREFIXES[lang].pick(rng, held)} {template}"
    user = phrase(rng, polite(rng, lang, template, held), held, **slots)
    if lang == "es":
        user = user.replace(" de el ", " del ")
    reply = f"<think>\n{steps}\n</think>\n\n{_ANSWERS[lang][quantity].format(answer)}"
    return talk("reasoning", lang, user, reply, kind="think", result=answer)


_Parts = tuple[dict[str, Split], dict[str, str], str, str, str]


def _ask_unit(rng: random.Random, lang: str, speed: int) -> tuple[str, str, str]:
    """(unit asked for, further step, answer)"""
    if rng.random() < 0.3:
        return rng.choice(_KMH[lang]), "", f"{speed} km/h"
    answer = f"{number(speed / 3.6)} m/s"
    return rng.choice(_UNITS[lang]), f"\n{speed} km/h / 3.6 = {answer}", answer


def _speed_parts(rng: random.Random, lang: str, held: bool) -> _Parts:
    speed, hours = _pair(rng, held, "speed")
    km = int(speed * hours)
    unit, step, answer = _ask_unit(rng, lang, speed)
    slots = {"d": _distance(rng, lang, km), "t": _duration(rng, lang, hours), "u": unit}
    return _SPEED, slots, _divide_steps(km, hours, speed) + step, "speed", answer


def _minutes_parts(rng: random.Random, lang: str, held: bool) -> _Parts:
    while True:
        minutes, km = rng.choice(list(_MINUTES)), rng.randint(1, 40)
        if is_held_out(f"minutes {minutes} {km}") == held:
            break
    factor = _MINUTES[minutes]
    speed = km * factor
    unit, step, answer = _ask_unit(rng, lang, speed)
    word = "minutes" if lang == "en" else "minutos"
    slots = {
        "d": _distance(rng, lang, km),
        "t": rng.choice((f"{minutes} min", f"{minutes} {word}")),
        "u": unit,
    }
    work = "\n= ".join([f"{km} km × {factor}", *_product(km, factor), f"{speed} km/h"])
    steps = f"{minutes} min = 1/{factor} h\n{work}{step}"
    return _SPEED, slots, steps, "speed", answer


def _convert_parts(rng: random.Random, lang: str, held: bool) -> _Parts:
    """Known by heart, so only the phrasing is held out."""
    speed = rng.randint(1, 250)
    answer = f"{number(speed / 3.6)} m/s"
    slots = {"s": f"{speed} {rng.choice(_KMH[lang])}", "u": rng.choice(_UNITS[lang])}
    return _CONVERT, slots, f"{speed} km/h / 3.6 = {answer}", "speed", answer


def _other_parts(rng: random.Random, lang: str, held: bool, kind: str) -> _Parts:
    speed, hours = _pair(rng, held, kind)
    km = int(speed * hours)
    slots = {"s": f"{speed} {rng.choice(_KMH[lang])}"}
    if kind == "way":
        slots["t"] = _duration(rng, lang, hours)
        return _DISTANCE, slots, _multiply_steps(speed, hours, km), "way", f"{km} km"
    slots["d"] = _distance(rng, lang, km)
    unit = {"en": ("hour", "hours"), "es": ("hora", "horas")}[lang][hours != 1]
    steps = f"{km} km / {speed} km/h\n= {km // 10} / {speed // 10} = {number(hours)} h"
    return _DURATION, slots, steps, "time", f"{number(hours)} {unit}"
