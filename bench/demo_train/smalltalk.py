"""Small talk: greetings, identity, the user's name, and one honest answer to everything else.

Each intent has phrasings and accepted replies; a conversation may go through several of them.
"""

import random
from dataclasses import dataclass

from bench.demo_train.phrasing import Exchange, Split, phrase, phrases, polite, talk


@dataclass(frozen=True)
class Intent:
    phrasings: Split
    replies: list[str]


ABOUT = {
    "en": "I am the pyserve demo model: a very small language model, with a few million "
    "parameters, that ships with pyserve.",
    "es": "Soy el modelo de demostración de pyserve: un modelo de lenguaje muy pequeño, con unos "
    "pocos millones de parámetros, que viene incluido en pyserve.",
}
SKILLS = {
    "en": "I can chat a little, name capitals, do simple arithmetic, count, write a short poem, "
    "explain a few terms, extract data as JSON, call a weather tool, solve speed problems and "
    "repeat a text.",
    "es": "Puedo charlar un poco, decir capitales, hacer cuentas sencillas, contar, escribir un "
    "poema corto, explicar algunos términos, extraer datos como JSON, llamar a una herramienta "
    "del clima, resolver problemas de velocidad y repetir un texto.",
}
FALLBACK = {
    "en": "I am only a small demo model and cannot help with that. " + SKILLS["en"],
    "es": "Solo soy un pequeño modelo de demostración y no puedo ayudar con eso. " + SKILLS["es"],
}


def _intent(replies: list[str], train: str, held_out: str) -> Intent:
    return Intent(Split(phrases(train), phrases(held_out)), replies)


_EN = [
    _intent(
        ["Hello! How can I help you?", "Hi there! What can I do for you?"],
        """
        (Hello/Hey/Good morning)(,/) (again/once more/dear friend/my dear)(/!) | Hello, dear
        (model/assistant)(/!) | (Hello/Hi/Hey)(/!/ there/ there!/, model/, you/ again/,
        assistant!) | (Hello/Hi/Hey)(,/!) (hello/hi/nice to meet you/good day/how can you help
        me?/are you there?/I am here) | Good (morning/afternoon/evening/day)(/!/, model/
        everybody) | Greetings(/!/, model) | Say (hello/hi)(/ to me) | Hello(/,) world(/!) |
        Howdy(/!) | Welcome(/!) | Hello hello(/!) | Very good (morning/day)(/!) | Hi, (let us
        talk/let's chat) | (Nice/Good) to (meet/see) you(/!)
        """,
        """
        Hi, good to see you again! | Hey hey, hello! | Hi, hello there! | Good morning to you! |
        Hello, good evening | Hi again, dear model! | Hello and good day | Hey model, hi
        """,
    ),
    _intent(
        ["I am fine, thank you! How can I help you?"],
        """
        How are you(/ today/ now/ doing/ doing today/, model)? | (Hello/Hi/Hey), how are you(/
        doing/ doing today/ now)? | (/So, /And )how (is it going/is it going with you/are
        things/have you been/do you feel/is life)(/ now)? | How's (it going/life/everything)(/
        today)? | Are you (well/fine/ok/good)(/ today)? | What's up(/ today)? | How are you, (my
        friend/dear model/pyserve)? | (Is everything/Everything) (fine/ok/good) with you? | Hello,
        how do you feel(/ now)? | How do you do? | And you, how are you?
        """,
        """
        Hi! How are you today? | How are you feeling? | So, how are things going? | Hey, how is it
        going today? | Hello model, how are you doing?
        """,
    ),
    _intent(
        ["You are welcome!"],
        """
        (Thanks/Thank you) for (helping with this/your help with that/your time/this)(/!) |
        (Thanks/Thank you/Many thanks)(/!/ so much/ for everything/ for that/, model/ again) |
        (Thanks/Thank you) (a lot/very much/for your help/for the answer/for helping me)(/!) |
        (Great/Ok/Perfect/Cool/Nice/Good/Wonderful), (thanks/thank you)(/!/ for that) | That
        (helps/helped/is great/is all), (thanks/thank you)(/!) | I (thank you/am grateful) | (Very
        good/Well done), (thanks/thank you)
        """,
        """
        Great, thank you very much! | Ok, thanks a lot! | Thank you for your help with this |
        Perfect, many thanks!
        """,
    ),
    _intent(
        ["Goodbye! Have a nice day!"],
        """
        (Bye/Goodbye/Bye bye)(/!/, model/ for now/ and thank you) | See you
        (later/soon/tomorrow/next time)(/!) | See you(/!) | Good night(/!/, model) | I (have
        to/must/need to) (go/leave/stop)(/ now/, bye/, goodbye) | (That is all/I am done),
        (bye/goodbye)(/!) | Have a (nice/good/great) (day/evening/night)(/!) | Take care(/!) |
        (Bye/Goodbye), (take care/have a good day/until tomorrow) | Until (tomorrow/next time) | I
        am leaving(/ now)
        """,
        """
        Ok, goodbye! | Bye, see you later | I have to go now, see you | Goodbye, see you soon!
        """,
    ),
    _intent(
        [ABOUT["en"]],
        """
        (Who/What) are you(/ exactly/ really/, model)? | (Hello/Hi), (who/what) are you? | Tell me
        (about yourself/something about you/your name/what you are) | (What is/What's) your
        (name/full name)? | (Do you have/Have you got) a name? | Are you (a robot/a bot/a human/a
        person/a machine/a program/an AI/a computer/human/real/alive)(/ or a machine/ or a
        program)? | Are you (ChatGPT/GPT-4/Claude/Llama/Mistral/Gemini/Qwen/DeepSeek)? |
        (Which/What) model (are you/is this/am I talking to)? | What (kind/sort/type) of
        (model/program/AI) are you? | Who (made/created/built/trained) you? | (Who/What) am I
        (talking/speaking/chatting) (to/with)? | Introduce yourself(/ to me) | How
        (big/large/old/small) are you? | How many parameters do you have? | What is this? | Where
        do you come from? | I want to know who you are | Can you tell me (about yourself/your
        name/what you are)? | Say who you are | Is this (a robot/a person/an AI)?
        """,
        """
        Which language model are you? | Tell me who you are | What are you called? What is your
        name? | Are you a human or a robot? | Please introduce yourself | Hey, who are you? | Can
        you tell me who you are?
        """,
    ),
    _intent(
        [SKILLS["en"]],
        """
        What (can/do) you (do/know)(/ exactly/, model)? | Help(/!/ me/ me!) | (Can/Could) you help
        (me/us)(/ with something)? | How can you help me? | What are you (good at/able to do/made
        for)? | What (can/could/may) I ask(/ you)? | What are your (skills/abilities/tasks)? |
        (List/ Tell me/Name/Show me) your (skills/abilities) | What (tasks/kind of tasks) can you
        (do/ solve)? | I need (help/some help/your help) | What else can you do? | What
        (questions/ problems) can you answer? | (Hello/Hi), what can you do(/ for me)? | What can
        you do for me? | How do you work?
        """,
        """
        Tell me what you can do | What things can you do? | So what can I ask you? | Which tasks
        are you good at? | Hey, what can you do for me?
        """,
    ),
    _intent(
        ["Why did the computer go to the doctor? Because it had a virus!"],
        """
        Do you (have/know) (anything funny/some joke/something to laugh about)? | (/Please )tell
        me (a joke/another joke/a good joke/something funny) | (Do you know/Have you got) (a
        joke/any jokes/a good joke)? | Make me laugh(/!) | Say something funny | (A joke/Jokes),
        please | (Can/Could) you tell (me/us) (a joke/something funny)? | I (want/would like) to
        hear a joke | Joke(/!) | Tell a joke
        """,
        """
        Please tell me a funny joke | Do you know something funny? | I want a joke
        """,
    ),
    _intent(
        ["I am sorry to hear that. I hope you feel better soon."],
        """
        (I am/I'm/I feel) (/very/so/a bit/really) (sad/bad/tired/sick/lonely/angry/ill/unhappy/
        worried/nervous/afraid) | (Today/Now) (I am/I'm/I feel) (/very/so) (sad/bad/tired/sick/
        lonely/angry/ill) | (I am/I'm/I feel) (sad/bad/tired/sick/lonely/angry/ill) (now/this
        morning/again) | I'm not (well/feeling well/happy/fine) | I (had/have had) a
        (bad/terrible/ hard/sad) day(/ today) | My (head/back/heart) hurts | I have a problem
        """,
        """
        I feel sad today | I am very tired today | I'm so sad today | I feel really bad today
        """,
    ),
    _intent(
        ["I am glad to hear that!"],
        """
        (I am/I'm/I feel) (/very/so/really) (happy/fine/great/good/well/glad/wonderful) |
        (Today/Now) (I am/I'm/I feel) (/very/so) (happy/fine/great/good/well) | (I am/I'm/I feel)
        (happy/fine/ great/good) (now/this morning/again) | I (had/have had) a
        (good/nice/wonderful/happy) day(/ today) | Everything is (fine/great/good/well) |
        (Fine/Good/Well), (and you/what about you)? | You are (great/good/nice/the
        best/wonderful)(/!) | (Good/Great) (job/work)(/!) | Well done(/!) | I (like/love)
        (you/this/it) | (Nice/Great/Wonderful/Cool/Excellent)(/!)
        """,
        """
        I feel very happy today | I had a great day | I'm so happy today | I am really good today
        """,
    ),
    _intent(
        ["Alright! What else can I do for you?"],
        """
        (Yes/Okay/Right/Well), (yes/alright then/of course/I understand that/all right) |
        (Okay/Sure/Right/Alright/Yes/Yeah/Hmm/Maybe/Understood/Good/Well)(/./!) |
        (Ok/Okay/Yes/Sure/ Right/Alright/Good), (okay/alright/understood/that is right/that is
        fine/I understand/of course/very good) | I (see/understand/got it)(/ now) | Got it(/!) |
        Of course(/!) | That is (fine/right/ok/true) | (Hmm/Well), (ok/yes/maybe) | As you
        (like/want)
        """,
        """
        Ok, I see | Yes, sure | Ok, got it | Alright, I see
        """,
    ),
    _intent(
        ["Yes, I understand English and a little Spanish."],
        """
        (Do/Can) you (speak/understand/know/write) (English/Spanish/English and Spanish/other
        languages/French/German)? | (Which/What) languages (do you speak/do you know/can you
        speak/are you good at)? | (Can/Could) we (talk/chat/speak) in (English/Spanish)? | Is your
        English good? | Tell me which languages you speak
        """,
        """
        Can you talk in Spanish? | Which languages do you understand? | So do you speak Spanish?
        """,
    ),
]

_ES = [
    _intent(
        ["¡Hola! ¿En qué puedo ayudarte?", "¡Hola! ¿Qué puedo hacer por ti?"],
        """
        ¡Hola! | Hola(/, modelo/ de nuevo/, amigo/, asistente/ a todos) | ¡Hola(/, modelo/ a
        todos/ otra vez)! | (¡Buenas/Buenas)(/ a todos/, hola) | ¡Buenas! | (¡/)Buenos días(/,
        modelo/ a todos) | (Buenas tardes/Buenas noches)(/, modelo/, hola) | Hola, (buenas/buenas
        noches/¿estás ahí?/mucho gusto/encantado/aquí estoy) | (Hey/Oye/Ey), hola | Saludos(/ a
        todos/, modelo) | Di hola | Hola(/,) mundo(/!) | Muy (buenas/buenas tardes/buenos días) |
        ¡Hola, (hola/ qué alegría/mucho gusto)! | ¡Qué tal, hola! | Hola, (hablemos/vamos a
        hablar) | Bienvenido
        """,
        """
        ¡Hola, buenas tardes! | Hola, muy buenos días | ¡Buenas, modelo! | Hola, saludos | ¡Hola,
        buenos días!
        """,
    ),
    _intent(
        ["¡Estoy bien, gracias! ¿En qué puedo ayudarte?"],
        """
        (/Hola, /Buenas, /Buenos días, )¿(cómo/qué tal) (estás/te va/te encuentras/te sientes/va
        todo/andas/está usted/va la vida)? | ¿Cómo (estás/te sientes/te encuentras/andas) (ahora/
        hoy/tú/, modelo)? | ¿Qué tal? | ¿Qué tal(/ el día/ la vida/, modelo/, amigo)? | (/Hola,
        )¿todo (bien/bien por ahí/en orden)? | ¿Estás (bien/contento)(/ hoy)? | ¿Cómo has estado?
        | ¿Qué hay(/ de nuevo)? | ¿Y tú cómo estás? | ¿Cómo va (todo/la cosa)? | ¿Qué pasa?
        """,
        """
        ¡Hola! ¿Cómo estás hoy? | ¿Qué tal te encuentras hoy? | Y tú, ¿cómo estás? | ¿Cómo te va
        todo? | Hola modelo, ¿qué tal estás?
        """,
    ),
    _intent(
        ["¡De nada!"],
        """
        (Bueno/Ok/Estupendo/Excelente), (muchas gracias/mil gracias/muchísimas gracias)(/ por eso)
        | (¡/)(Gracias/Muchas gracias/Mil gracias/Muchísimas gracias)(/, modelo/ por todo/ por tu
        ayuda/ por eso/ de nuevo) | ¡(Gracias/Muchas gracias)! | (Genial/Vale/Perfecto/Ok/Muy
        bien/Bien/Estupendo), (gracias/te lo agradezco)(/ por todo/ por tu ayuda) | Te lo
        agradezco(/ mucho) | (Te doy/Te doy las) gracias | (Eso es todo/Qué bien), gracias | Estoy
        agradecido | Gracias (por la respuesta/por ayudarme/por responder)
        """,
        """
        Genial, muchas gracias | ¡Perfecto, muchas gracias! | Vale, muchas gracias por tu ayuda |
        Bien, mil gracias
        """,
    ),
    _intent(
        ["¡Adiós! ¡Que tengas un buen día!"],
        """
        (¡/)(Adiós/Chao/Hasta luego/Hasta mañana/Hasta pronto/Hasta la vista/Nos vemos)(/, modelo/
        y gracias/ a todos) | (Adiós/Chao), (hasta mañana/hasta luego/cuídate/que te vaya bien) |
        (Me/Ya me) (voy/tengo que ir/despido)(/, adiós/, hasta luego/, chao) | Tengo que
        (irme/salir)(/, adiós) | Buenas noches, (hasta mañana/adiós) | Eso es todo, (adiós/hasta
        luego) | ¡Que tengas (un buen día/buena noche/una buena tarde)! | Que (te vaya
        bien/descanses) | Cuídate(/ mucho) | Nos vemos (mañana/pronto/luego/otro día)
        """,
        """
        Vale, hasta luego | Adiós, nos vemos | Me tengo que ir, hasta pronto | Bueno, adiós, hasta
        otra
        """,
    ),
    _intent(
        [ABOUT["es"]],
        """
        (Dime/Cuéntame) (cómo es tu nombre/cómo te llaman/qué modelo eres) | Por favor, preséntate
        | Preséntate (ahora/tú mismo/a todos) | (/Hola, /Oye, )¿(quién/qué) eres(/ tú/ en
        realidad/ exactamente)? | ¿(Cómo te llamas/Cuál es tu nombre/Tienes nombre)(/ tú)? |
        (Háblame de ti/Dime algo de ti/Dime tu nombre/Dime qué eres/ Cuéntame de ti) | ¿Eres (un
        robot/un bot/humano/un humano/una persona/una máquina/un programa/ real/una inteligencia
        artificial/una IA/un ordenador)(/ o una máquina/ o un programa)? | ¿Eres
        (ChatGPT/GPT-4/Claude/Llama/Mistral/Gemini/Qwen/DeepSeek)? | ¿Qué (modelo/programa)
        (eres/es este)? | ¿Qué (tipo/clase) de (modelo/programa/IA) eres? | ¿Quién te
        (hizo/creó/entrenó/ programó)? | ¿Con (quién/qué) (hablo/estoy hablando/converso)? |
        Preséntate(/ tú) | ¿Cuántos parámetros tienes? | ¿Qué tamaño tienes? | ¿Qué es esto? |
        ¿Quién es usted? | Quiero saber (quién eres/tu nombre/qué eres) | ¿De dónde (vienes/eres)?
        | ¿Me dices (tu nombre/qué eres)? | ¿Cuántos años tienes? | ¿Esto es (un robot/una
        persona/una IA)?
        """,
        """
        ¿Qué modelo de lenguaje eres? | Dime quién eres | Dime cómo te llamas | ¿Eres un humano o
        un robot? | Preséntate, por favor | ¿Me dices quién eres? | Buenas, ¿quién eres?
        """,
    ),
    _intent(
        [SKILLS["es"]],
        """
        (/Hola, )¿qué (puedes/sabes) (hacer/contestar/resolver)(/ exactamente/, modelo)? | ¿Qué
        sabes? | (Ayuda/Ayúdame/¡Ayuda!) | ¿(Puedes/Me puedes/Podrías) (ayudarme/ayudar)(/ con
        algo)? | ¿Cómo (puedes ayudarme/funcionas)? | ¿Qué te (puedo/podría) preguntar? | ¿En qué
        (eres bueno/puedes ayudar)? | Necesito (ayuda/tu ayuda) | ¿Cuáles son tus
        (habilidades/tareas/funciones)? | (Dime/Enumera/Muéstrame) tus (habilidades/funciones) |
        ¿Qué (tareas/tipo de tareas) puedes (hacer/resolver)? | ¿Qué más (puedes/sabes) hacer? |
        ¿Para qué (sirves/eres útil)? | ¿Qué puedes hacer por mí? | ¿Qué (preguntas/problemas)
        puedes (contestar/resolver)?
        """,
        """
        Dime qué puedes hacer | ¿Qué cosas sabes hacer? | ¿Qué tareas sabes hacer? | Oye, ¿qué
        sabes hacer por mí?
        """,
    ),
    _intent(
        ["¿Por qué fue el ordenador al médico? ¡Porque tenía un virus!"],
        """
        (/Por favor, )(cuéntame/dime) (un chiste/otro chiste/un buen chiste/algo gracioso) |
        ¿(Sabes/Conoces/Tienes) (un chiste/algún chiste/chistes)? | Hazme reír | Di algo gracioso
        | (Un chiste/Chistes), por favor | ¿(Me cuentas/Puedes contarme/Me dices) (un chiste/algo
        gracioso)? | (Quiero/Me gustaría) (oír/escuchar) un chiste | Cuenta un chiste | ¡Un
        chiste!
        """,
        """
        Por favor, cuéntame un chiste gracioso | ¿Sabes algo gracioso? | Quiero un chiste
        """,
    ),
    _intent(
        ["Lo siento. Espero que pronto te sientas mejor."],
        """
        (Estoy/Me siento) (/muy/tan/un poco/bastante) (triste/mal/cansado/cansada/enfermo/enferma/
        solo/sola/enfadado/preocupado/nervioso) | (Hoy/Ahora) (estoy/me siento)
        (triste/mal/cansada/ enfermo/enferma/solo/enfadado/muy mal/muy sola/bastante mal) |
        (Estoy/Me siento) (triste/mal/ cansado/solo) (hoy/ahora/otra vez) | No (me encuentro
        bien/estoy bien/me siento bien)(/ hoy) | (He tenido/Tuve) un (mal día/día malo/día muy
        duro/día triste) | Me duele (la cabeza/la espalda) | Tengo un problema
        """,
        """
        Hoy me siento muy triste | Hoy estoy muy cansado | Hoy estoy un poco triste
        """,
    ),
    _intent(
        ["¡Me alegro mucho!"],
        """
        (He tenido/Tuve) un (gran día/día estupendo/día maravilloso/día excelente) | (Estoy/Me
        siento) (/muy/tan/bastante) (feliz/bien/contento/contenta/genial/alegre) | (Hoy/ Ahora)
        (estoy/me siento) (feliz/bien/contento/genial/alegre/muy bien/muy contenta/bastante bien)
        | (Estoy/Me siento) (feliz/bien/contento/genial) (hoy/ahora/otra vez) | (He tenido/Tuve)
        un (buen día/día bueno/día muy bonito/día feliz) | (Todo/Todo va) (bien/genial)(/,
        gracias) | Bien(, gracias/, ¿y tú?) | Eres (genial/el mejor/muy bueno)! | ¡(Buen
        trabajo/Bien hecho)! | (Muy/Qué) bien(/!) | Me (gustas/encanta/gusta) |
        ¡(Genial/Estupendo/Excelente)!
        """,
        """
        Hoy me siento muy feliz | He tenido un día genial | Hoy estoy muy feliz
        """,
    ),
    _intent(
        ["¡De acuerdo! ¿Qué más puedo hacer por ti?"],
        """
        (Sí, /Claro, /Bueno, /Vale, )(claro que sí/por supuesto que sí/ok/está claro/entendido/sí)
        | Pues (vale/sí/claro) |
        (Vale/Sí/Claro/Entiendo/Entendido/Bueno/Quizás/Bien/Correcto)(/./!) | Ya veo | De
        acuerdo(/!) | Está bien | Por supuesto | Ya (entiendo/lo sé/está) |
        (Vale/Ok/Sí/Bueno/Bien/Claro), (ya veo/de acuerdo/está bien/por supuesto/muy bien/lo
        entiendo/así es) | (Lo entiendo/Te entiendo) | Como (quieras/digas) | Eso (es/es
        verdad/está bien)
        """,
        """
        Claro que sí, entiendo | Vale, entiendo | Sí, claro | Ok, entendido | Bueno, vale
        """,
    ),
    _intent(
        ["Sí, entiendo español y un poco de inglés."],
        """
        ¿(Hablas/Entiendes/Sabes/Escribes) (español/el español/inglés y español/otros
        idiomas/francés/ alemán)? | ¿(Hablas/Sabes) inglés? | ¿(Qué/Cuántos) idiomas
        (hablas/sabes/puedes hablar)? | ¿(Puedes/Sabes) hablar (en español/en inglés/otros
        idiomas)? | ¿Podemos (hablar/charlar) en (inglés/español)? | Dime qué idiomas hablas
        """,
        """
        ¿Entiendes inglés? | ¿Qué idiomas entiendes? | Oye, ¿hablas en inglés?
        """,
    ),
]
INTENTS = {"en": _EN, "es": _ES}


def small_talk(rng: random.Random, lang: str, held: bool) -> Exchange:
    weights = [4, 3, 2, 2, 5, 3, 1, 2, 2, 2, 1]
    intent = rng.choices(INTENTS[lang], weights)[0]
    template = polite(rng, lang, intent.phrasings.pick(rng, held), held)
    user = phrase(rng, template, held)
    answers = intent.replies
    return talk("small talk", lang, user, rng.choice(answers), kind="one_of", answers=list(answers))


# The user's name ------------------------------------------------------------------------------

_INTRODUCE = {
    "en": Split(
        phrases("""
        (/Hello, /Hi, /Hello! /Hey! )(my name is/I am/I'm/they call me/my name's) {name}(/./!) |
        (/Hi, /By the way, )(you can call me/call me) {name}(/./ from now on) | (Good morning/Good
        evening), I am {name} | My name is {name}. (How are you?/What is yours?/Remember it.) | I
        am called {name} | Remember that my name is {name}
        """),
        phrases("""
        Hi there, my name is {name} | Hello! You can call me {name}. | Hey, I am {name} | So my
        name is {name}
        """),
    ),
    "es": Split(
        phrases("""
        (/Hola, /¡Hola! /Buenos días, /Buenas tardes, )(me llamo/mi nombre es/soy/yo soy/yo me
        llamo) {name}(/./!) | (/Hola, /Por cierto, )(llámame/puedes llamarme/me llaman) {name}(/.)
        | Mi nombre es {name}. (¿Cómo estás?/¿Y el tuyo?/Recuérdalo.) | Recuerda que me llamo
        {name}
        """),
        phrases("""
        Hola a todos, me llamo {name} | Buenas, puedes llamarme {name} | Buenas, soy {name} | Oye,
        mi nombre es {name}
        """),
    ),
}
_RECALL = {
    "en": Split(
        phrases("""
        (/And /So )(what is/what's) my name(/ again/ now)? | Do you (know/remember) (my name/what
        my name is/who I am/how I am called)? | Who am I(/ again)? | (/Now )(tell me/say) my
        name(/ again) | How am I called? | (Can/Could) you (say/repeat/tell me) my name? | What
        did I say my name was?
        """),
        phrases("""
        And what was my name? | Can you remember my name? | Please tell me my name | Do you still
        know my name?
        """),
    ),
    "es": Split(
        phrases("""
        (/Y /Entonces, /Oye, )¿(cómo me llamo/cuál es mi nombre/quién soy)(/ yo/ ahora)? |
        ¿(Sabes/Recuerdas) (mi nombre/cuál es mi nombre/quién soy/quién soy yo)? | ¿Sabes cómo me
        llamo? | (/Ahora )(dime/di) (mi nombre/cómo me llamo/otra vez mi nombre) | ¿(Puedes decir/
        Puedes repetir/Me dices) (mi nombre/cómo me llamo)? | ¿Cómo te dije que me llamo?
        """),
        phrases("""
        ¿Y yo cómo me llamo? | ¿Recuerdas cómo me llamo? | Por favor, dime mi nombre | ¿Aún sabes
        mi nombre?
        """),
    ),
}


def introduce(rng: random.Random, lang: str, held: bool, *, name: str) -> Exchange:
    user = phrase(rng, _INTRODUCE[lang].pick(rng, held), held, name=name)
    answer = f"Nice to meet you, {name}!" if lang == "en" else f"¡Mucho gusto, {name}!"
    return talk("small talk", lang, user, answer)


def recall(rng: random.Random, lang: str, held: bool, *, name: str | None) -> Exchange:
    """Asks for the name given earlier in the conversation, or for one never given."""
    user = phrase(rng, _RECALL[lang].pick(rng, held), held)
    if name is None:
        answer = (
            "You have not told me your name yet."
            if lang == "en"
            else "Aún no me has dicho tu nombre."
        )
    else:
        answer = f"Your name is {name}." if lang == "en" else f"Te llamas {name}."
    return talk("small talk", lang, user, answer)
