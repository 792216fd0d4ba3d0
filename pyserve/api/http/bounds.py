"""Limits on the connections, time and memory that clients may use, each with its reason.

These limits concern the transport of requests and responses. The fields of a request are limited
where they are checked (wire/, generation/), the number of waiting requests by --max-queue. Every
total here is over all connections of one server.
"""

from __future__ import annotations

# -- connections -----------------------------------------------------------------------------------

MAX_CONNECTIONS = 16384  # each takes 30 KB of memory
MAX_TLS_CONNECTIONS = 2048  # each takes 320 KB: asyncio has a TLS read buffer of 256 KiB for each
NUM_OTHER_FILES = 128  # descriptors of RLIMIT_NOFILE that are reserved for other files
MAX_HANDSHAKES = 128  # unfinished TLS handshakes; each takes 0.6 ms of the event loop
TLS_HANDSHAKE_TIMEOUT_S = 10.0
BACKLOG = 2048  # connections that wait in the kernel to be accepted
ACCEPTS_PER_TURN = 16  # accepts in one turn of the event loop; each takes about 0.1 ms
ACCEPT_PAUSE_S = 0.1  # after a failed accept, such as for want of descriptors or memory
# A full server closes an expendable connection to accept a new one. A connection is expendable if
# it is idle, or if for so long its client has been sending a body or has not read what was written.
EXPENDABLE_S = 10.0
NUM_LOOKED_AT = 64  # connections that are examined to find an expendable one
KEEP_ALIVE_S = 620.0  # between requests: longer than proxies keep a connection, at most 600 s
LOG_INTERVAL_S = 10.0  # minimum time between two log lines about connections

# Reading a connection shows when its client has gone. A connection is not read when the client has
# shut down its sending side, or has pipelined too much behind the running request. Then something
# is written to it, so that a client that has gone answers with a reset: detected within a second.
FIRST_PROBE_S = 0.05  # until a connection is probed for the first time
PROBE_S = 0.4  # between probes
# A machine that is gone answers nothing: TCP keep-alive gives it up after 30 + 3 * 10 s.
TCP_KEEP_ALIVE_IDLE_S, TCP_KEEP_ALIVE_INTERVAL_S, NUM_TCP_KEEP_ALIVES = 30, 10, 3

# -- heads -----------------------------------------------------------------------------------------

HEAD_TIMEOUT_S = 20.0  # from the first byte of a request to the end of its headers
MAX_HEAD_BYTES = 16 * 1024  # request line and headers
MAX_FIELD_BYTES = 8190  # the request line, or one header

# -- bodies; config.py limits each to 32 MB --------------------------------------------------------

BODY_TIMEOUT_S = 120.0  # from the end of the headers
# So many first bytes of each body are not counted; on all connections they are 256 MiB at most.
SMALL_BODY_BYTES = 2**14
MAX_UPLOAD_BYTES = 2**28  # counted bytes of all bodies that have not been decoded yet
MAX_CLIENT_UPLOAD_BYTES = 2**27  # the same for one client, as keys.py defines it
UPLOAD_RETRY_S = 5  # Retry-After of a body that there is no room for
LINGERING_TIME_S = 2.0  # how long the rest of a refused body is read and dropped

# -- responses-------------------------------------------------------------------------------------

# A large response is written in pieces as its client reads them. Otherwise the transport's buffers
# would hold a second copy of it; those of TLS cannot even be measured from here.
PIECE_BYTES = 2**15
WRITE_BUFFER_BYTES = 2**14  # while more is unsent on a connection, the next piece waits
# Bytes of all responses, streamed or whole, that clients have not read. To make room, the client
# that holds most of them loses a connection on which it reads nothing.
MAX_UNREAD_BYTES = 2**28
UNREAD_RETRY_S = 5  # Retry-After of a response that there is no room for
WRITE_TIMEOUT_S = 30.0  # a client that takes longer to read one or two pieces is cut off
DRAIN_WRITE_TIMEOUT_S = 5.0  # the same while the server shuts down
