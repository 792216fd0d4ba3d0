// The memory through which cards of one machine work together, and the table that tells an op where
// it is. The Python twin is pyserve/ops/peer_layout.py; a test compares the two.
//
// Every rank has one buffer, which all others have mapped:
//
//   [ control | one-shot | reduce | spread | gather | tokens ]
//
// Whatever a rank writes for others to read, it writes to their buffers: a write is one trip over
// the link, a read is two. The other ranks' parts of an area lie side by side, in the order of
// ranks, this one left out: part_of.
//
//   one-shot  3 rounds of tp_size - 1 messages, each word absent (cuda/gpu/comm/one_shot.cuh)
//   reduce    tp_size - 1 pieces of a message, of which this rank adds up its own
//   spread    tp_size - 1 pieces that the others have added up
//   gather    tp_size - 1 parts, of the ranks that are not the leader, in the leader's buffer
//   tokens    2 rounds of the leader's tokens, 64 bits each
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pyserve {

constexpr int32_t kMaxTpSize = 8;
constexpr int32_t kMaxRoundCtas = 256;  // of a one-shot kernel
constexpr int32_t kMaxFlagCtas = 64;    // of the others, which tell each other by flags
constexpr int32_t kOneShotRounds = 3;
constexpr int32_t kMaxPeerTokens = 4096;

// Words of the table, 64 bits each. It stays on the host.
enum PeerWord : int32_t {
  kPeerMagicWord = 0,
  kPeerTpRank,
  kPeerTpSize,
  kPeerSpinNs,   // after which a wait is given up
  kPeerIsTrial,  // not 0: that is noted in control; else the kernel traps
  kPeerOneShotOffset,  // areas, in bytes from the start of a buffer
  kPeerOneShotBytes,   // of a message, at most
  kPeerReduceOffset,
  kPeerSpreadOffset,
  kPeerPieceBytes,  // of a piece, at most
  kPeerGatherOffset,
  kPeerGatherBytes,  // of a rank's part, at most
  kPeerTokensOffset,
  kPeerBuffers,  // the buffers of all ranks, at the addresses that they have here
  kPeerWords = kPeerBuffers + kMaxTpSize,
};
constexpr int64_t kPeerMagic = 0x70656572;  // "peer"

// Words of control, 32 bits each: those of the first group are this rank's own, the others write
// the rest. Zero at first. A number of a round is one more than the last of its op, and may wrap.
enum ControlWord : int32_t {
  kControlRounds = 0,  // [kMaxRoundCtas]: which of the 3 rounds of one-shot is next
  kControlReduced = kControlRounds + kMaxRoundCtas,  // [kMaxFlagCtas]: the last round of two-shot
  kControlGathered = kControlReduced + kMaxFlagCtas,   // [kMaxFlagCtas]: of gather
  kControlTold = kControlGathered + kMaxFlagCtas,      // of tokens
  kControlIsGivenUp,                                   // a wait of a trial has been
  kControlReduceFlags = kControlTold + 64,  // [kMaxTpSize, kMaxFlagCtas]: pieces are here
  kControlSpreadFlags = kControlReduceFlags + kMaxTpSize * kMaxFlagCtas,  // likewise
  kControlGatherFlags = kControlSpreadFlags + kMaxTpSize * kMaxFlagCtas,  // likewise, parts
  kControlGatherAcks = kControlGatherFlags + kMaxTpSize * kMaxFlagCtas,   // [kMaxFlagCtas]
  kControlTokenAcks = kControlGatherAcks + kMaxFlagCtas,                  // [kMaxTpSize]
  kControlWords = kControlTokenAcks + 64,
};

// Where the part of rank `source` lies among those of the others, in the buffer of `owner`.
PYSERVE_HOST_DEVICE constexpr int32_t part_of(int32_t source, int32_t owner) {
  return source - (source > owner);
}

}  // namespace pyserve
