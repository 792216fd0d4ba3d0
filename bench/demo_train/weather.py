"""The weather tool: calling it in the Hermes format, answering from its result, doing without.

Function and argument names differ from conversation to conversation, so that they are read from the
tools in the system block and not learned by heart.
"""

import json
import random
from dataclasses import dataclass

from bench.demo_train.phrasing import (
    Exchange,
    Split,
    is_held_out,
    phrase,
    phrases,
    polite,
    strip_accents,
    talk,
    words,
)
from bench.demo_train.slots import city, made_up_phrase, made_up_word

_VERBS = words("get, fetch, read, check, query, show, obtener, consultar, ver, dar, current, , ")
_CORES = words("""
weather, weather, weather, forecast, clima, clima, tiempo, temperature, pronostico, meteo,
weather_data
""")
_ENDS = words("now, api, tool, v2, actual, hoy, info, city, today, report, , , , , ")
_KEYS = words("""
city, location, place, town, ciudad, lugar, localidad, where, q, query, address, region, donde
""")
_KEY_ENDS = words("name, id, text, _, nombre, , , , ")
_UNIT_KEYS = words("unit, units, unidad, unidades, temperature_unit, scale, escala, unit_system")
_ABOUT = Split(
    phrases("""
    Get the current weather of a city | Obtener el clima actual de una ciudad | Get the weather |
    Get the current weather in a given location | Returns the weather for a place | Current
    weather | Devuelve el tiempo de un lugar | Consulta el clima | Weather of a city now | Obtiene
    el clima
    """),
    phrases("Look up the weather for a city | Da el clima actual de un lugar"),
)
_KEY_ABOUT = Split(
    phrases("""
    Name of the city | Nombre de la ciudad | The city | The city and state, e.g. San Francisco, CA
    | La ciudad | City name, e.g. Paris | Place to look up
    """),
    phrases("Name of the place | Nombre del lugar"),
)
_OTHER_TOOLS = [
    ("get_time", "Get the time of a city", "city"),
    ("search_web", "Search the web", "query"),
    ("send_email", "Send an email", "recipient"),
    ("get_stock_price", "Get the price of a stock", "symbol"),
    ("calculator", "Evaluate an expression", "expression"),
    ("traducir", "Traduce un texto", "texto"),
    ("play_music", "Play a song", "song"),
]
_CONDITIONS = [
    ("sunny", "soleado"), ("cloudy", "nublado"), ("rainy", "lluvioso"), ("clear", "despejado"),
    ("windy", "ventoso"), ("foggy", "con niebla"), ("snowy", "nevado"), ("stormy", "tormentoso"),
    ("partly cloudy", "parcialmente nublado"), ("light rain", "lluvia ligera"),
]  # fmt: skip
_NEW_CONDITIONS = {
    "en": Split(
        words("hail, drizzle, hot and dry, overcast, heavy rain, freezing, mostly sunny"),
        words("thunder, humid, heavy snow, mild, light wind"),
    ),
    "es": Split(
        words("""
        granizo, llovizna, calor seco, cubierto, lluvia fuerte, helado, mayormente soleado
        """),
        words("truenos, húmedo, nieve fuerte, templado, viento suave"),
    ),
}

_ASK = {
    "en": Split(
        phrases("""
        (What is/How is/Tell me/Show me) the weather (/today )in {c}, please(/./?) | (Is it/Will
        it be) (hot/cold/sunny) in {c}, please? | (I want/Give me) the weather (in/for) {c},
        please | (What is/What's/How is/How's) the weather (/like /now /today /right now )in {c}(/
        today/ now/ tomorrow)? | Weather (in/for/of) {c}(/?/ now/ today) | (/Please )(tell me/give
        me/show me/find) the weather (in/for/of) {c}(/ now/ today) | Is it
        (raining/cold/hot/sunny/warm/windy/snowing/ cloudy) in {c}(/ now/ today)? | What is the
        temperature (in/of) {c}(/ now)? | How (hot/cold/ warm) is it (in/now in) {c}? | (Do I
        need/Should I take) (an umbrella/a jacket/a coat) in {c}? | (Check/Get/Look up) the
        (weather/temperature) (in/for/of) {c} | Can you (check/get/give me/find) the weather
        (in/for/of) {c}? | {c} weather | The weather in {c}, please | I am (going to/in/
        travelling to) {c}. (What is/How is) the weather(/ there)? | Will it (rain/snow/be hot) in
        {c}? | What is the (current/local) weather in {c}? | I want to know the weather in {c} |
        Do you know the weather in {c}? | What weather (is there/do they have) in {c}? | How many
        degrees is it in {c}?
        """),
        phrases("""
        Can you tell me the weather in {c}? | How is the weather now in {c}, please? | Tell me
        what the weather is like in {c} | Could you check the weather for {c}? | What temperature
        is it in {c}? | I need the weather in {c}
        """),
    ),
    "es": Split(
        phrases("""
        (Dime/Dame/Consulta) (qué tiempo hace/el clima/el tiempo) (hoy /ahora /)en {c}, por
        favor(/.) | ¿(Cuál es/Cómo está/Cómo es/Qué tal está) el (clima/tiempo) (en/de) {c}(/ hoy/
        ahora/ mañana)? | ¿Qué (tiempo/clima) (hace/hay/tienen) (en/hoy en/ahora en) {c}? |
        (Clima/Tiempo/El clima/El tiempo) (en/de) {c}(/ hoy/ ahora) | ¿Clima en {c}? |
        (Dime/Dame/Muéstrame/Busca) el (clima/ tiempo) (en/de) {c}(/ hoy/ ahora) |
        ¿(Llueve/Nieva/Está nublado/Hay sol) en {c}(/ hoy/ ahora)? | ¿Hace
        (frío/calor/sol/viento/buen tiempo) en {c}(/ hoy)? | ¿(Qué/Cuál es la) temperatura (hay
        en/de/en) {c}(/ ahora)? | ¿Cuánto (calor/frío) hace en {c}? | ¿Necesito (paraguas/abrigo/
        chaqueta) en {c}? | (Consulta/Mira/Comprueba) el (clima/tiempo) (en/de) {c} | ¿Puedes
        (consultar/mirar/darme/buscar) el (clima/tiempo) (en/de) {c}? | El (clima/tiempo) en {c},
        por favor | (Voy a/Estoy en/Viajo a) {c}. ¿(Qué tiempo hace/Cómo está el clima)? | ¿Va a
        (llover/ nevar/hacer calor) en {c}? | ¿Cuál es el (clima/tiempo) actual (en/de) {c}? |
        Quiero saber el (clima/tiempo) (en/de) {c} | ¿Sabes (qué tiempo hace/el clima) en {c}? |
        ¿Cuántos grados hay en {c}?
        """),
        phrases("""
        ¿Puedes decirme el clima en {c}? | ¿Cómo está ahora el tiempo en {c}? | Dime qué tiempo
        hace en {c} | ¿Podrías consultar el tiempo en {c}? | ¿Qué temperatura hace en {c}? |
        Necesito el clima de {c}
        """),
    ),
}
_ASK_TWO = {
    "en": phrases("""
    What is the weather in {c} and in {c2}? | Weather in {c} and {c2} | Compare the weather in {c}
    and {c2} | How is the weather in {c} and in {c2}?
    """),
    "es": phrases("""
    ¿Cuál es el clima en {c} y en {c2}? | Clima en {c} y {c2} | Compara el clima de {c} y {c2} |
    ¿Qué tiempo hace en {c} y en {c2}?
    """),
}
_AND = {
    "en": Split(
        phrases("""
        And (in/for) {c}? | (What about/How about) {c}? | And {c}? | (And how/How) is it in {c}? |
        (Now/Then) {c} | (Also/And also) (in/for) {c} | And the weather in {c}?
        """),
        phrases("And what about {c}? | And now in {c}?"),
    ),
    "es": Split(
        phrases("""
        ¿Y (en/para/el de) {c}? | ¿Y {c}? | ¿(Qué tal/Cómo está/Y cómo está) en {c}? |
        (Ahora/Luego) {c} | También (en/el de) {c} | ¿Y el clima (en/de) {c}?
        """),
        phrases("¿Y qué tal en {c}? | ¿Y ahora en {c}?"),
    ),
}
_IN_UNIT = {
    "en": {"celsius": " in celsius", "fahrenheit": " in fahrenheit"},
    "es": {"celsius": " en celsius", "fahrenheit": " en fahrenheit"},
}
NO_TOOL = {
    "en": "I cannot look up the weather: no weather tool was given to me.",
    "es": "No puedo consultar el clima: no tengo ninguna herramienta del clima.",
}


@dataclass(frozen=True)
class WeatherTool:
    """The names by which this conversation's tool wants to be called."""

    name: str
    key: str
    unit_key: str | None


def _identifier(rng: random.Random, held: bool, lists: list[list[str]], *, made_up: float) -> str:
    """One part of each list, now and then a made-up one, joined as programmers do."""
    while True:
        parts = [
            strip_accents(made_up_word(rng, held)) if rng.random() < made_up else rng.choice(values)
            for values in lists
        ]
        parts = [part for part in parts if part] or [rng.choice(lists[-1])]
        joined = "_".join(parts)
        if rng.random() < 0.2:
            joined = parts[0] + "".join(part.capitalize() for part in parts[1:])
        if joined and is_held_out(joined) == held:
            return joined


def _weather_tool(rng: random.Random, held: bool) -> WeatherTool:
    common = not held and rng.random() < 0.3
    name = "get_weather" if common else ""
    key = rng.choice(("city", "city", "location")) if common else ""
    unit_key = _identifier(rng, held, [_UNIT_KEYS], made_up=0.2)
    if not held and rng.random() < 0.4:
        unit_key = "unit"
    return WeatherTool(
        name or _identifier(rng, held, [_VERBS, _CORES, _ENDS], made_up=0.15),
        key or _identifier(rng, held, [_KEYS, _KEY_ENDS], made_up=0.2),
        unit_key if rng.random() < 0.6 else None,
    )


def tool_set(
    rng: random.Random, held: bool, *, weather: bool = True
) -> tuple[list[dict[str, object]], WeatherTool | None]:
    """The tools of a conversation in OpenAI's form, and the weather tool if it is among them."""
    tool = None
    functions = []
    count = rng.choice((0, 0, 0, 1, 2) if weather else (1, 2))
    for name, about, key in rng.sample(_OTHER_TOOLS, count):
        properties: dict[str, object] = {key: {"type": "string"}}
        functions.append(_function(rng, name, about, properties, [key]))
    if weather:
        tool = _weather_tool(rng, held)
        properties = {tool.key: {"type": "string"}}
        if rng.random() < 0.6:
            properties = {tool.key: {"type": "string", "description": _KEY_ABOUT.pick(rng, held)}}
        if tool.unit_key:
            unit = {tool.unit_key: {"type": "string", "enum": ["celsius", "fahrenheit"]}}
            properties = properties | unit if rng.random() < 0.8 else unit | properties
        functions.append(_function(rng, tool.name, _ABOUT.pick(rng, held), properties, [tool.key]))
    rng.shuffle(functions)
    return [{"type": "function", "function": f} for f in functions], tool


def _function(
    rng: random.Random, name: str, about: str, properties: dict[str, object], required: list[str]
) -> dict[str, object]:
    parameters: dict[str, object] = {"type": "object", "properties": properties}
    if rng.random() < 0.9:
        parameters["required"] = required
    if rng.random() < 0.1:
        parameters["additionalProperties"] = False
    function: dict[str, object] = {"name": name, "description": about, "parameters": parameters}
    if rng.random() < 0.1 and "eather" in name:
        del function["description"]
    if rng.random() < 0.05:
        function["strict"] = True
    return function


def call(name: str, arguments: dict[str, str]) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def weather(
    rng: random.Random,
    lang: str,
    held: bool,
    *,
    tool: WeatherTool | None,
    full: bool | None = None,
    follow_up: bool = False,
) -> Exchange:
    """A question about the weather. With `full` it goes on to the tool's result and the answer."""
    place = city(rng, held)
    template = (_AND if follow_up and tool else _ASK)[lang].pick(rng, held)
    if tool is None:
        user = phrase(rng, polite(rng, lang, template, held), held, c=place)
        return talk("weather: no tool", lang, user, NO_TOOL[lang])
    arguments = {tool.key: place}
    if tool.unit_key and rng.random() < 0.3 and not follow_up:
        unit = rng.choice(("celsius", "fahrenheit"))
        arguments[tool.unit_key] = unit
        mark = "?" if template.endswith("?") else ""
        template = template.rstrip("?") + _IN_UNIT[lang][unit] + mark
    places = [place]
    calls = [call(tool.name, arguments)]
    if rng.random() < 0.08 and not held and not follow_up:
        places.append(city(rng, held))
        template = rng.choice(_ASK_TWO[lang])
        calls = [call(tool.name, {tool.key: p}) for p in places]
    user = phrase(rng, polite(rng, lang, template, held), held, c=place, c2=places[-1])
    exchange = Exchange(
        "weather: call",
        lang,
        [
            {"role": "user", "content": user},
            {"role": "assistant", "content": "", "tool_calls": calls},
        ],
        {"kind": "tool", "calls": [c["function"] for c in calls]},
    )
    if rng.random() < 0.6 if full is None else full:
        _answer(rng, exchange, places, held)
    return exchange


def _answer(rng: random.Random, exchange: Exchange, places: list[str], held: bool) -> None:
    """Appends the tool's results and the answer read off them."""
    sentences, facts = [], []
    for place in places:
        result, sentence, found = _result(rng, exchange.lang, place, held)
        exchange.messages.append({"role": "tool", "content": result})
        sentences.append(sentence)
        facts += found
    exchange.messages.append({"role": "assistant", "content": " ".join(sentences)})
    exchange.task = "weather: answer"
    exchange.check = {"kind": "contains", "facts": facts}


def _result(rng: random.Random, lang: str, place: str, held: bool) -> tuple[str, str, list[str]]:
    """(what the tool returns, the sentence for it, the facts it must contain)"""
    if rng.random() < 0.06:
        reason = rng.choice(("city not found", "timeout", "no data", made_up_phrase(rng, held)))
        start = {"en": "I could not get the weather in", "es": "No pude obtener el clima de"}[lang]
        return _json({"error": reason}), f"{start} {place}: {reason}.", [reason]
    degrees = rng.choice((rng.randint(-15, 42), rng.randint(-15, 42), rng.randint(0, 105)))
    kind = rng.random()
    if kind < 0.35:  # the tool may speak the other language: these few are translated
        known = rng.choice(_CONDITIONS)
        said, found = rng.choice(known), known[0 if lang == "en" else 1]
    elif kind < 0.6:
        said = found = _NEW_CONDITIONS[lang].pick(rng, held)
    else:
        said = found = made_up_phrase(rng, held)
    unit = rng.choice(("celsius", "celsius", "fahrenheit", "", ""))
    sign = {"celsius": " °C", "fahrenheit": " °F", "": {"en": " degrees", "es": " grados"}[lang]}[
        unit
    ]
    if rng.random() < 0.1:
        said = ""
    result = _result_text(rng, place, degrees, unit, said)
    start = {"en": "The weather in {} is {}, {}{}.", "es": "El clima en {} es: {}, {}{}."}[lang]
    if not said:
        start = {"en": "It is {2}{3} in {0}.", "es": "Hay {2}{3} en {0}."}[lang]
        return result, start.format(place, "", degrees, sign), [place, f"{degrees}{sign}"]
    return result, start.format(place, found, degrees, sign), [place, found, f"{degrees}{sign}"]


def _json(record: dict[str, object]) -> str:
    return json.dumps(record, ensure_ascii=False)


def _result_text(rng: random.Random, place: str, degrees: int, unit: str, said: str) -> str:
    """The forms that weather tools answer in."""
    letter = {"celsius": "°C", "fahrenheit": "°F", "": "°"}[unit]
    if said and rng.random() < 0.15:
        return rng.choice((f"{degrees}{letter}, {said}", f"{said}, {degrees} {letter}"))
    record: dict[str, object] = {
        rng.choice(("temperature", "temperature", "temp", "temperatura")): degrees
    }
    if unit and rng.random() < 0.7:
        record[rng.choice(("unit", "unit", "units", "unidad"))] = unit
    elif unit:
        record = dict.fromkeys(record, f"{degrees}{letter}")
    if said:
        record[rng.choice(("condition", "condition", "conditions", "description", "clima"))] = said
    if rng.random() < 0.4:
        record = {rng.choice(("city", "location", "ciudad")): place} | record
    if rng.random() < 0.15:
        record["humidity"] = rng.randint(10, 100)
    items = list(record.items())
    if rng.random() < 0.3:
        rng.shuffle(items)
    return _json(dict(items))
