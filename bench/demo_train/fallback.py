"""Everything the model cannot do, answered by one honest sentence.

The questions are as different as possible, so that what is left over, and not a list, is learned.
"""

import random

from bench.demo_train.phrasing import Exchange, Split, phrase, phrases, polite, talk, words
from bench.demo_train.slots import PLAIN_WORDS, made_up_phrase
from bench.demo_train.smalltalk import FALLBACK

_QUESTIONS = {
    "en": Split(
        phrases("""
        (Do you know/Tell me/Can you say) (where/who/how/why/when) {x} (lives/works/was/goes/did
        {y}/came) | How many {x} (do you know/can I buy/live there/did you see/do I need/were in
        {y})? | How (many/much) {x}? | Where (do/can) (I/we/you) (get/see/eat/meet) (a/the/my)
        {x}(/ here/ now)? | Where is (/my /your ){x}(/ located/ now)? | In which
        (country/city/house) is {x}? | (Is/Are) there (a /any /many /){x}(/ here/ in {y})? | What
        {x} is there? | Do you (know/have/see/want) (the/a/my) {x}? | (Write/Read) a
        (book/chapter/report/song) about {x} and {y} | (/Do you know /Can you tell me /I want to
        know )(where/when/why/how) (I can {x}/the {x} was {y}/they {x} the {y}/one can {x} a
        {y})(?/.) | (Do you know/Tell me) (who/why/when/how old) {x} (is/ was)(?/.) | (Which/What)
        {x} (is the {y}/has a {y}/can I {x}/do you {y})? | (How/Where/When) (can/ should/do)
        (I/we/you) {x} (a/the/my) {y}? | (Write/Make/Give/Create/Find/Prepare) (me /)(a/the/my)
        {x} (for/with/of/about) (a/the/my) {y} | (Write/Make) (a story/a program/an article/a
        speech/a plan/a list/a text) (about/for/on) {x}(/ and {y}) | How many {x} (does {y}
        have/have {y}/are in the {y})? | (Translate/Say/Put) (the word/the sentence/this) {x}
        (in/into) (French/Chinese/German/ {y}) | (I like/I have/I want/I bought/I see) (a/the/my)
        {x} | (The/My/A) {x} (is/was/has) {y} | Why (is/are/was) (the/a) {x} (so /){y}? |
        (What/Who) (made/broke/found/eats) (the/a) {x}? | (Is/Are/Was) (the/a/my) {x}
        (in/on/at/with) (the/a) {y}? | Should I (buy/sell/{x}/eat) (a/the) {y}? | Why is the {x}
        {y}? | How do I make a {x}? | How can I fix my {x}? | Where can I buy a {x}? | When was
        the {x} invented? | Who invented the {x}? | Who wrote {x}? | Who won the {x}? | Write a
        Python function to sort a {x} | Write code for a {x} | Write an essay about {x} | Write a
        SQL query for the {x} table | Write me an email about the {x} | Summarise this article
        about {x} | Translate {x} into French | Translate this to German: {x} {y} | What should I
        cook with {x}? | Give me a recipe for {x} | Recommend a book about {x} | Recommend a {x}
        film | What is the best {x}? | What is the price of a {x}? | How much does a {x} cost? |
        How old is the {x}? | How tall is {x}? | How far is {x} from {y}? | How many people live
        in {x}? | Who is the president of {x}? | Who is the king of {x}? | Who is {x}? | What
        happened in the {x}? | What happened in 1945? | What do you think about {x}? | Do you like
        {x}? | Can you draw a {x}? | Draw me a {x} | Play a {x} | Sing a song about {x} | Plan a
        trip to {x} | Book a flight to {x} | Order a {x} | Send a message to {x} | What day is it
        today? | What time is it? | What is the date? | What is the news about {x}? | What is the
        meaning of life? | Is it true that {x} is {y}? | Is {x} better than {y}? | What is the
        difference between {x} and {y}? | Should I learn {x}? | How do I learn {x}? | How does a
        {x} work? | How do I install {x}? | My {x} does not work | I need a {x} | I want to {x} a
        {y} | Tell me a story about a {x} | Tell me about the history of {x} | Write a song about
        {x} | Compose a letter to {x} | Make a table of {x} | Give me ten ideas for {x} | Give me
        advice about {x} | Find me a {x} | Search the web for {x} | Open the {x} | Turn on the {x}
        | Set an alarm for {x} | Remind me of the {x} | What is the square root of {x}? | Solve
        the integral of {x} | Prove that {x} is {y} | Explain why {x} is {y} | Compare {x} and {y}
        | Review my {x} | Debug this {x}: {y} | Correct this text: {x} {y} | Improve this
        sentence: {x} {y} | {x} {y} | {x} {y} {z} | What colour is the {x}? | Which {x} is {y}? |
        Why do {x} {y}? | When does the {x} {y}? | Where is the {x}? | Where does {x} live? | Can
        I {x} my {y}? | Would you {x} a {y}? | Could you {x} the {y}? | Did the {x} {y}? | List
        all {x} | Name three {x} | Name a famous {x} | What rhymes with {x}? | Invest in {x} or
        {y}? | Analyse the {x} | Classify this text: {x} {y} | Is this {x} good or bad? | Describe
        a {x} | Describe the {x} of {y} | Generate a {x} | Create a {x} for my {y} | Design a {x}
        | Build a {x} with {y}
        """),
        phrases("""
        Which is the biggest {x} in {y}? | How do I cook a {x}? | Who was the first {x}? | Write a
        Java program for the {x} | What is the best way to {x} a {y}? | Where do I find a {x}? |
        Write a novel about {x} and {y} | Which {x} should I buy? | Translate the word {x} into
        Italian | How many {x} are there? | Why did the {x} {y}? | Make a plan for my {x} | Do you
        know where {x} is?
        """),
    ),
    "es": Split(
        phrases("""
        ¿(Sabes/Me dices/Puedes decir) (dónde/quién/cómo/cuándo) (vive/trabaja/fue/va/era) {x}? |
        ¿Cuántos {x} (hay en casa/conoces/puedo comprar/viven allí/necesito)? | ¿Dónde (puedo
        ver/compro/veo/como/hay) (un/el/mi) {x}? | ¿Dónde (está/queda) (/mi /tu ){x}(/ ahora)? |
        ¿En qué (país/ciudad/casa) está {x}? | ¿Hay (/un /muchos ){x}(/ aquí/ en {y})? | ¿Qué {x}
        (compro/elijo/me recomiendas/hay/quieres comprar)? | ¿(Conoces/Tienes/Ves/Quieres)
        (el/un/mi) {x}? | ¿Por qué (/no )(el/la/un) {x} {y} tanto? | (Escribe/Lee) un
        (libro/capítulo/informe) sobre {x} y {y} | (/¿Sabes /¿Me dices /Quiero saber
        )(dónde/cuándo/por qué/cómo) (puedo {x}/se {x} el {y}/hay un {x}/ está el {x} {y})(?/.) |
        (Sabes/Dime) (quién/por qué/cuándo/cómo) (es/fue/era) {x}(?/.) | ¿(Qué/Cuál) {x} (es el
        {y}/tiene un {y}/puedo {y}/quieres)? | ¿(Cómo/Dónde/Cuándo) (puedo/debo/hay que/se puede)
        {x} (un/el/mi) {y}? | (Escribe/Haz/Dame/Crea/Busca/Prepara) (un/el/mi/una) {x}
        (para/con/de/ sobre) (un/el/mi) {y} | (Escribe/Haz/Redacta) (un cuento/un programa/un
        artículo/un discurso/un plan/una lista/un texto) (sobre/para) {x}(/ y {y}) | ¿Cuántos {x}
        (tiene {y}/tienen los {y}/hay en {y})? | (Traduce/Di/Pon) (la palabra/la frase/esto) {x}
        (al/en) (francés/chino/alemán/{y}) | (Me gusta/Tengo/Quiero/He comprado/Veo) (un/el/mi)
        {x} | (El/Mi/Un) {x} (es/era/tiene/está) {y} | ¿Por qué (es/está/era/tiene) (el/un/tan)
        {x} {y}? | ¿(Qué/Quién) (hizo/rompió/encontró/come) (el/un) {x}? | ¿(Está/Es/Era)
        (el/un/mi) {x} (en/con/de) (el/un) {y}? | ¿Debo (comprar/vender/{x}/comer) (un/el) {y}? |
        {x} {y} | ¿Por qué el {x} es {y}? | ¿Cómo hago un {x}? | ¿Cómo puedo arreglar mi {x}? |
        ¿Dónde puedo comprar un {x}? | ¿Cuándo se inventó el {x}? | ¿Quién inventó el {x}? |
        ¿Quién escribió {x}? | ¿Quién ganó el {x}? | Escribe una función en Python para ordenar
        una {x} | Escribe código para un {x} | Escribe un ensayo sobre {x} | Escribe una consulta
        SQL para encontrar los 10 mejores {x} | Escríbeme un correo sobre {x} | Resume este
        artículo sobre {x} | Traduce {x} al francés | Traduce esto al alemán: {x} {y} | ¿Qué
        cocino con {x}? | Dame una receta de {x} | Recomiéndame un libro sobre {x} | Recomienda
        una película de {x} | ¿Cuál es el mejor {x}? | ¿Cuál es el precio de un {x}? | ¿Cuánto
        cuesta un {x}? | ¿Cuántos años tiene {x}? | ¿Cuánto mide {x}? | ¿A qué distancia está {x}
        de {y}? | ¿Cuántas personas viven en {x}? | ¿Quién es el presidente de {x}? | ¿Quién es el
        rey de {x}? | ¿Quién es {x}? | ¿Qué pasó en el {x}? | ¿Qué pasó en 1945? | ¿Qué piensas de
        {x}? | ¿Te gusta {x}? | ¿Puedes dibujar un {x}? | Dibújame un {x} | Pon un {x} | Canta una
        canción sobre {x} | Planea un viaje a {x} | Reserva un vuelo a {x} | Pide un {x} | Envía
        un mensaje a {x} | ¿Qué día es hoy? | ¿Qué hora es? | ¿Qué fecha es? | ¿Qué noticias hay
        sobre {x}? | ¿Cuál es el sentido de la vida? | ¿Es verdad que {x} es {y}? | ¿Es mejor {x}
        que {y}? | ¿Cuál es la diferencia entre {x} y {y}? | ¿Debería aprender {x}? | ¿Cómo
        aprendo {x}? | ¿Cómo funciona un {x}? | ¿Cómo instalo {x}? | Mi {x} no funciona | Necesito
        un {x} | Quiero {x} un {y} | Cuéntame un cuento sobre un {x} | Cuéntame la historia de {x}
        | Escribe una canción sobre {x} | Redacta una carta a {x} | Haz una tabla de {x} | Dame
        diez ideas para {x} | Dame consejos sobre {x} | Búscame un {x} | Busca {x} en la web |
        Abre el {x} | Enciende la {x} | Pon una alarma para {x} | Recuérdame el {x} | ¿Cuál es la
        raíz cuadrada de {x}? | Resuelve la integral de {x} | Demuestra que {x} es {y} | Explica
        por qué {x} es {y} | Compara {x} y {y} | Revisa mi {x} | Depura este {x}: {y} | Corrige
        este texto: {x} {y} | Mejora esta frase: {x} {y} | ¿De qué color es el {x}? | ¿Qué {x} es
        {y}? | ¿Dónde está el {x}? | ¿Dónde vive {x}? | ¿Puedo {x} mi {y}? | ¿Podrías {x} el {y}?
        | Enumera los {x} | Nombra tres {x} | Nombra un {x} famoso | ¿Qué rima con {x}? | Analiza
        el {x} | Clasifica este texto: {x} {y} | ¿Es este {x} bueno o malo? | Describe un {x} |
        Describe el {x} de {y} | Genera un {x} | Crea un {x} para mi {y} | Diseña un {x} |
        Construye un {x} con {y} | ¿Por qué hay {x}? | ¿Cuándo sale el {x}? | ¿Para qué se usa
        {x}? | ¿Y el {x} de {y}?
        """),
        phrases("""
        ¿Cuál es el {x} más grande de {y}? | ¿Cómo cocino un {x}? | ¿Quién fue el primer {x}? |
        Escribe un programa en Java para el {x} | ¿Cuál es la mejor forma de {x} un {y}? | ¿Dónde
        encuentro un {x}? | Escribe una novela sobre {x} y {y} | ¿Qué {x} debería comprar? |
        Traduce la palabra {x} al italiano | ¿Cuántos {x} hay? | ¿Por qué el {x} {y}? | Haz un
        plan para mi {x} | ¿Sabes dónde está {x}?
        """),
    ),
}
_THINGS = {
    "en": Split(
        words("""
        sky, car, computer, phone, cake, pizza, soup, lamp, door, bicycle, guitar, movie, game,
        war, moon, ocean, bread, list, customer, clients, bike, telephone, wheel, wall, king,
        song, cheese, wine, shoe, jacket, engine, battery, printer, camera, money, bank, school,
        hospital, airport, hotel, beach, mountain, dog, cat, horse, bird, fish, tiger, chair,
        table, kitchen, garden, Einstein, Shakespeare, Napoleon, Mars, Bitcoin, Linux, Rust, Java,
        chess, football, yoga, cold, blue, heavy, expensive, broken, fast, paint, build, sell,
        travel, sleep, dance, eat
        """),
        words("""
        sandwich, television, umbrella, train ticket, elephant, sofa, blanket, Mozart, Jupiter,
        tennis, slow, cheap, swim, draw, keyboard
        """),
    ),
    "es": Split(
        words("""
        cielo, coche, ordenador, teléfono, pastel, pizza, sopa, lámpara, puerta, bicicleta,
        guitarra, película, juego, guerra, luna, océano, pan, lista, cliente, clientes, rueda,
        pared, rey, canción, queso, vino, zapato, chaqueta, motor, batería, impresora, cámara,
        dinero, banco, escuela, hospital, aeropuerto, hotel, playa, montaña, perro, gato, caballo,
        pájaro, pez, tigre, silla, mesa, cocina, jardín, Einstein, Cervantes, Napoleón, Marte,
        Bitcoin, Linux, Rust, Java, ajedrez, fútbol, yoga, frío, azul, pesado, caro, roto, rápido,
        pintar, construir, vender, viajar, dormir, bailar, comer
        """),
        words("""
        bocadillo, televisión, paraguas, billete de tren, elefante, sofá, manta, Mozart, Júpiter,
        tenis, lento, barato, nadar, dibujar, teclado
        """),
    ),
}


def thing(rng: random.Random, lang: str, held: bool) -> str:
    kind = rng.random()
    if kind < 0.35:
        return made_up_phrase(rng, held)
    if kind < 0.45:
        return PLAIN_WORDS.pick(rng, held)
    if kind < 0.5:
        return str(rng.randint(2, 2000))
    return _THINGS[lang].pick(rng, held)


def fallback(rng: random.Random, lang: str, held: bool) -> Exchange:
    template = _QUESTIONS[lang].pick(rng, held)
    slots = {name: thing(rng, lang, held) for name in "xyz"}
    user = phrase(rng, polite(rng, lang, template, held), held, **slots)
    return talk("fallback", lang, user, FALLBACK[lang])
