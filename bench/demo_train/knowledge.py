"""What the demo model knows by heart: capitals and a few explained terms, in English and Spanish.

Facts cannot be derived, so none is held out; only the ways to ask for them are (facts.py).
"""

# country | país | capital (en) | capital (es)
CAPITALS = [
    tuple(line.split("|"))
    for line in """
France|Francia|Paris|París
Spain|España|Madrid|Madrid
Germany|Alemania|Berlin|Berlín
Italy|Italia|Rome|Roma
Portugal|Portugal|Lisbon|Lisboa
the United Kingdom|el Reino Unido|London|Londres
England|Inglaterra|London|Londres
Ireland|Irlanda|Dublin|Dublín
Belgium|Bélgica|Brussels|Bruselas
the Netherlands|los Países Bajos|Amsterdam|Ámsterdam
Switzerland|Suiza|Bern|Berna
Austria|Austria|Vienna|Viena
Poland|Polonia|Warsaw|Varsovia
Greece|Grecia|Athens|Atenas
Sweden|Suecia|Stockholm|Estocolmo
Norway|Noruega|Oslo|Oslo
Denmark|Dinamarca|Copenhagen|Copenhague
Finland|Finlandia|Helsinki|Helsinki
Iceland|Islandia|Reykjavik|Reikiavik
Russia|Rusia|Moscow|Moscú
Ukraine|Ucrania|Kyiv|Kiev
Hungary|Hungría|Budapest|Budapest
Romania|Rumania|Bucharest|Bucarest
Bulgaria|Bulgaria|Sofia|Sofía
Croatia|Croacia|Zagreb|Zagreb
Serbia|Serbia|Belgrade|Belgrado
the Czech Republic|la República Checa|Prague|Praga
Slovakia|Eslovaquia|Bratislava|Bratislava
Turkey|Turquía|Ankara|Ankara
Japan|Japón|Tokyo|Tokio
China|China|Beijing|Pekín
India|India|New Delhi|Nueva Delhi
South Korea|Corea del Sur|Seoul|Seúl
North Korea|Corea del Norte|Pyongyang|Pionyang
Thailand|Tailandia|Bangkok|Bangkok
Vietnam|Vietnam|Hanoi|Hanói
Indonesia|Indonesia|Jakarta|Yakarta
the Philippines|Filipinas|Manila|Manila
Malaysia|Malasia|Kuala Lumpur|Kuala Lumpur
Mongolia|Mongolia|Ulaanbaatar|Ulán Bator
Pakistan|Pakistán|Islamabad|Islamabad
Iran|Irán|Tehran|Teherán
Iraq|Irak|Baghdad|Bagdad
Saudi Arabia|Arabia Saudita|Riyadh|Riad
Israel|Israel|Jerusalem|Jerusalén
Egypt|Egipto|Cairo|El Cairo
Morocco|Marruecos|Rabat|Rabat
Algeria|Argelia|Algiers|Argel
Tunisia|Túnez|Tunis|Túnez
Nigeria|Nigeria|Abuja|Abuya
Kenya|Kenia|Nairobi|Nairobi
Ethiopia|Etiopía|Addis Ababa|Adís Abeba
Ghana|Ghana|Accra|Acra
Senegal|Senegal|Dakar|Dakar
South Africa|Sudáfrica|Pretoria|Pretoria
Australia|Australia|Canberra|Canberra
New Zealand|Nueva Zelanda|Wellington|Wellington
Canada|Canadá|Ottawa|Ottawa
the United States|Estados Unidos|Washington, D.C.|Washington D. C.
Mexico|México|Mexico City|Ciudad de México
Guatemala|Guatemala|Guatemala City|Ciudad de Guatemala
Honduras|Honduras|Tegucigalpa|Tegucigalpa
El Salvador|El Salvador|San Salvador|San Salvador
Nicaragua|Nicaragua|Managua|Managua
Costa Rica|Costa Rica|San José|San José
Panama|Panamá|Panama City|Ciudad de Panamá
Cuba|Cuba|Havana|La Habana
the Dominican Republic|la República Dominicana|Santo Domingo|Santo Domingo
Jamaica|Jamaica|Kingston|Kingston
Colombia|Colombia|Bogotá|Bogotá
Venezuela|Venezuela|Caracas|Caracas
Ecuador|Ecuador|Quito|Quito
Peru|Perú|Lima|Lima
Bolivia|Bolivia|Sucre|Sucre
Chile|Chile|Santiago|Santiago
Argentina|Argentina|Buenos Aires|Buenos Aires
Uruguay|Uruguay|Montevideo|Montevideo
Paraguay|Paraguay|Asunción|Asunción
Brazil|Brasil|Brasília|Brasilia
""".strip().splitlines()
]

# term | término | explanation | explicación; a blank line between two
TERMS = [
    tuple(" ".join(part.split()) for part in block.split("|"))
    for block in """
quantum computing | la computación cuántica
| Quantum computing uses qubits, which can be 0 and 1 at the same time, to solve some problems
much faster than a normal computer.
| La computación cuántica usa cúbits, que pueden ser 0 y 1 a la vez, para resolver algunos
problemas mucho más rápido que un ordenador normal.

machine learning | el aprendizaje automático
| Machine learning is a way to make programs that learn rules from examples instead of being told
every rule.
| El aprendizaje automático es una forma de crear programas que aprenden reglas a partir de
ejemplos en lugar de recibir cada regla.

artificial intelligence | la inteligencia artificial
| Artificial intelligence is the field that builds programs able to do tasks that seem to need
human intelligence.
| La inteligencia artificial es el campo que crea programas capaces de hacer tareas que parecen
necesitar inteligencia humana.

a neural network | una red neuronal
| A neural network is a model made of layers of simple connected units whose weights are learned
from examples.
| Una red neuronal es un modelo hecho de capas de unidades simples conectadas cuyos pesos se
aprenden con ejemplos.

a language model | un modelo de lenguaje
| A language model is a program that predicts the next token of a text, and so can write and
answer.
| Un modelo de lenguaje es un programa que predice el siguiente token de un texto, y así puede
escribir y responder.

photosynthesis | la fotosíntesis
| Photosynthesis is how plants use sunlight to turn water and carbon dioxide into sugar and
oxygen.
| La fotosíntesis es la forma en que las plantas usan la luz del sol para convertir agua y dióxido
de carbono en azúcar y oxígeno.

gravity | la gravedad
| Gravity is the force by which things with mass attract each other; it keeps us on the ground and
the planets in orbit.
| La gravedad es la fuerza por la que se atraen las cosas con masa; nos mantiene en el suelo y a
los planetas en órbita.

a black hole | un agujero negro
| A black hole is a region of space where gravity is so strong that not even light can escape.
| Un agujero negro es una región del espacio donde la gravedad es tan fuerte que ni la luz puede
escapar.

relativity | la relatividad
| Relativity is Einstein's theory that time and space depend on motion and gravity, while the
speed of light stays the same.
| La relatividad es la teoría de Einstein según la cual el tiempo y el espacio dependen del
movimiento y la gravedad, mientras la velocidad de la luz no cambia.

DNA | el ADN
| DNA is the molecule that stores the instructions with which living things grow and work.
| El ADN es la molécula que guarda las instrucciones con las que los seres vivos crecen y
funcionan.

evolution | la evolución
| Evolution is the slow change of species over many generations, driven by variation and natural
selection.
| La evolución es el cambio lento de las especies a lo largo de muchas generaciones, por variación
y selección natural.

an atom | un átomo
| An atom is the smallest unit of a chemical element: a nucleus with electrons around it.
| Un átomo es la unidad más pequeña de un elemento químico: un núcleo con electrones alrededor.

electricity | la electricidad
| Electricity is the flow of charged particles, usually electrons in a wire, and it carries
energy.
| La electricidad es el flujo de partículas cargadas, normalmente electrones en un cable, y
transporta energía.

energy | la energía
| Energy is the ability to do work; it changes its form but is never lost.
| La energía es la capacidad de hacer trabajo; cambia de forma pero nunca se pierde.

the water cycle | el ciclo del agua
| The water cycle is the journey of water from sea to clouds, from clouds to rain, and back to the
sea.
| El ciclo del agua es el viaje del agua del mar a las nubes, de las nubes a la lluvia y de vuelta
al mar.

climate change | el cambio climático
| Climate change is the long-term warming of the Earth, caused mainly by gases from burning coal,
oil and gas.
| El cambio climático es el calentamiento de la Tierra a largo plazo, causado sobre todo por los
gases de quemar carbón, petróleo y gas.

the greenhouse effect | el efecto invernadero
| The greenhouse effect is the warming of the Earth by gases that let sunlight in and keep heat
from leaving.
| El efecto invernadero es el calentamiento de la Tierra por gases que dejan entrar la luz del sol
y no dejan salir el calor.

renewable energy | la energía renovable
| Renewable energy comes from sources that do not run out, such as sun, wind and water.
| La energía renovable viene de fuentes que no se agotan, como el sol, el viento y el agua.

a volcano | un volcán
| A volcano is an opening in the Earth's crust through which lava, ash and gases come out.
| Un volcán es una abertura en la corteza de la Tierra por la que salen lava, ceniza y gases.

an earthquake | un terremoto
| An earthquake is a shaking of the ground, caused when parts of the Earth's crust suddenly move.
| Un terremoto es un temblor del suelo, causado cuando partes de la corteza de la Tierra se mueven
de repente.

the solar system | el sistema solar
| The solar system is the Sun and everything that orbits it: eight planets, their moons, asteroids
and comets.
| El sistema solar es el Sol y todo lo que gira a su alrededor: ocho planetas, sus lunas,
asteroides y cometas.

a galaxy | una galaxia
| A galaxy is a huge group of stars, gas and dust held together by gravity; ours is the Milky Way.
| Una galaxia es un enorme grupo de estrellas, gas y polvo unidos por la gravedad; la nuestra es
la Vía Láctea.

a vaccine | una vacuna
| A vaccine shows the body a harmless part of a germ, so that it can defend itself later.
| Una vacuna muestra al cuerpo una parte inofensiva de un germen, para que después pueda
defenderse.

a virus | un virus
| A virus is a tiny particle that can only multiply inside living cells and often causes disease.
| Un virus es una partícula diminuta que solo puede multiplicarse dentro de células vivas y a
menudo causa enfermedades.

the immune system | el sistema inmunitario
| The immune system is the body's defence: cells and organs that find and destroy germs.
| El sistema inmunitario es la defensa del cuerpo: células y órganos que encuentran y destruyen
gérmenes.

democracy | la democracia
| Democracy is a form of government in which the people choose their leaders and laws by voting.
| La democracia es una forma de gobierno en la que el pueblo elige a sus líderes y sus leyes con
el voto.

inflation | la inflación
| Inflation is a general rise in prices, so that the same money buys less than before.
| La inflación es una subida general de los precios, de modo que el mismo dinero compra menos que
antes.

supply and demand | la oferta y la demanda
| Supply and demand set prices: what many want and few offer becomes expensive, and the reverse.
| La oferta y la demanda fijan los precios: lo que muchos quieren y pocos ofrecen se encarece, y
al revés.

the internet | internet
| The internet is a worldwide network of computers that exchange data by common rules.
| Internet es una red mundial de ordenadores que intercambian datos con reglas comunes.

an algorithm | un algoritmo
| An algorithm is a list of exact steps that solves a problem.
| Un algoritmo es una lista de pasos exactos que resuelve un problema.

an operating system | un sistema operativo
| An operating system is the program that manages a computer's memory, files and devices and runs
the other programs.
| Un sistema operativo es el programa que gestiona la memoria, los archivos y los dispositivos de
un ordenador y ejecuta los demás programas.

a database | una base de datos
| A database is an organised store of data that can be searched and changed quickly.
| Una base de datos es un almacén ordenado de datos que se puede consultar y cambiar rápidamente.

encryption | el cifrado
| Encryption turns a message into a secret code that only someone with the key can read.
| El cifrado convierte un mensaje en un código secreto que solo puede leer quien tiene la clave.

a compiler | un compilador
| A compiler is a program that translates source code into instructions a processor can run.
| Un compilador es un programa que traduce código fuente a instrucciones que un procesador puede
ejecutar.

recursion | la recursión
| Recursion is when a function solves a problem by calling itself on a smaller part of it.
| La recursión es cuando una función resuelve un problema llamándose a sí misma con una parte más
pequeña.

a GPU | una GPU
| A GPU is a processor with thousands of small cores that does many simple calculations at the
same time.
| Una GPU es un procesador con miles de núcleos pequeños que hace muchos cálculos simples al mismo
tiempo.

a CPU | una CPU
| A CPU is the main processor of a computer; it runs the instructions of its programs.
| Una CPU es el procesador principal de un ordenador; ejecuta las instrucciones de sus programas.

an API | una API
| An API is a set of rules by which one program can use the services of another.
| Una API es un conjunto de reglas con las que un programa puede usar los servicios de otro.

cloud computing | la computación en la nube
| Cloud computing means using computers and storage of others over the internet and paying for
what you use.
| La computación en la nube consiste en usar ordenadores y almacenamiento de otros por internet y
pagar por lo que se usa.

open source | el código abierto
| Open source is software whose source code anyone may read, use and change.
| El código abierto es software cuyo código fuente cualquiera puede leer, usar y cambiar.

a blockchain | una cadena de bloques
| A blockchain is a list of records shared by many computers, in which each block confirms the one
before it.
| Una cadena de bloques es una lista de registros compartida por muchos ordenadores, en la que
cada bloque confirma el anterior.

tokenization | la tokenización
| Tokenization cuts a text into small pieces, called tokens, which a language model reads and
writes.
| La tokenización corta un texto en piezas pequeñas, llamadas tokens, que un modelo de lenguaje
lee y escribe.

a KV cache | una caché KV
| A KV cache keeps the keys and values of the tokens already read, so that a language model need
not compute them again.
| Una caché KV guarda las claves y los valores de los tokens ya leídos, para que un modelo de
lenguaje no los calcule otra vez.

probability | la probabilidad
| Probability is a number from 0 to 1 that says how likely something is to happen.
| La probabilidad es un número de 0 a 1 que dice lo posible que es que algo ocurra.

pyserve | pyserve
| pyserve is a small server for language models with an OpenAI-compatible API.
| pyserve es un servidor pequeño para modelos de lenguaje con una API compatible con OpenAI.
""".strip().split("\n\n")
]
