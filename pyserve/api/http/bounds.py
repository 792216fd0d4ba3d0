"""What clients may cost before, around and after their requests: every bound and its reason.

What one request may ask for is bounded where its fields are checked (wire/, generation/), how
many may wait by --max-queue. Each sum here is over all connections of one server.
"""

from __future__ import annotations

# -- connections -----------------------------------------------------------------------------------

MAX_CONNECTIONS = 16384  # 30 KB each
MAX_TLS_CONNECTIONS = 2048  # 320 KB each: asyncio reads TLS into a buffer of 256 KiB of its own
NUM_OTHER_FILES = 128  # descriptors that are not connections: RLIMIT_NOFILE less these
MAX_HANDSHAKES = 128  # unfinished ones of TLS: 0.6 ms of the loop each, and all may come at once
TLS_HANDSHAKE_TIMEOUT_S = 10.0
BACKLOG = 2048  # connections that wait in the kernel to be accepted
ACCEPTS_PER_TURN = 16  # of the event loop, a tenth of a millisecond each
ACCEPT_PAUSE_S = 0.1  # after an accept that failed: no descriptor, no memory
# A full server closes one of these for a new connection: the longest without a request, a client
# whose body takes so long, or one that has not taken what was written to it for so long.
EXPENDABLE_S = 10.0
NUM_LOOKED_AT = 64  # connections, for one of these
KEEP_ALIVE_S = 620.0  # between requests: longer than proxies keep theirs, 600 s the longest of them
LOG_INTERVAL_S = 10.0  # of the lines about connections

# A client is heard to have gone while its connection is read. While it is not (the client has ended
# its side, or sent too much behind its running request), its machine is asked: within a second.
FIRST_PROBE_S = 0.05
PROBE_S = 0.4
# A machine that is gone says nothing: TCP asks it, and gives up after a minute.
TCP_KEEP_ALIVE_IDLE_S, TCP_KEEP_ALIVE_INTERVAL_S, NUM_TCP_KEEP_ALIVES = 30, 10, 3

# -- heads -----------------------------------------------------------------------------------------

HEAD_TIMEOUT_S = 20.0  # from the first byte of a request to the end of its headers
MAX_HEAD_BYTES = 16 * 1024  # request line and headers
MAX_FIELD_BYTES = 8190  # of them, one line

# -- bodies, each of 32 MB at most (config.py) -----------------------------------------------------

BODY_TIMEOUT_S = 120.0  # from the end of the headers
SMALL_BODY_BYTES = 2**14  # of each body: neither counted nor refused, 256 MiB on all connections
MAX_UPLOAD_BYTES = 2**28  # of all bodies, from their first byte until they are decoded
MAX_CLIENT_UPLOAD_BYTES = 2**27  # of them, those of one client (keys.py)
UPLOAD_RETRY_S = 5
LINGERING_TIME_S = 2.0  # how long the rest of a refused body is read and dropped

# -- answers ---------------------------------------------------------------------------------------

# An answer is written in pieces as its client takes them, so that it is held once and not again in
# buffers below (TLS has none that could be seen from here).
PIECE_BYTES = 2**15
WRITE_BUFFER_BYTES = 2**14  # unsent on one connection: more is waited for, before the next piece
# Of all answers that are not taken yet, streamed or whole. Who holds most of it and has taken
# nothing for longest is cut off for others.
MAX_UNREAD_BYTES = 2**28
UNREAD_RETRY_S = 5
WRITE_TIMEOUT_S = 30.0  # to take one piece, and at most two: who is slower is cut off
DRAIN_WRITE_TIMEOUT_S = 5.0  # the same while the server shuts down
