// The memory through which the devices of one machine exchange data, and the table that tells an op
// where that memory is. The Python twin is pyserve/ops/peer_layout.py; a test compares the two.
//
// Every rank owns one buffer, which all other ranks have mapped:
//
//   [ control | one-shot | reduce | spread | gather | tokens ]
//
// A rank hands data to others by writing it to their buffers, because a write takes one trip over
// the link and a read takes two. Where an area has a part for each other rank, the parts lie side
// by side in the order of the ranks, without one for the owner: see part_of.
//
//   one-shot  room for 3 rounds of tp_size - 1 messages; every word that has not arrived holds a
//             marker (cuda/gpu/comm/one_shot.cuh)
//   reduce    the tp_size - 1 copies of this rank's own piece of a message, which it sums up
//   spread    the tp_size - 1 pieces that the other ranks have summed up
//   gather    in the leader's buffer: the tp_size - 1 parts of the ranks that are not the leader
//   tokens    room for 2 rounds of the leader's tokens, 64 bits each
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pyserve {

constexpr int32_t kMaxTpSize = 8;
constexpr int32_t kMaxRoundCtas = 256;  // limit on the CTAs of a one-shot kernel
// Limit on the CTAs of the other kernels, which signal each other by flags.
constexpr int32_t kMaxFlagCtas = 64;
constexpr int32_t kOneShotRounds = 3;
constexpr int32_t kMaxPeerTokens = 4096;

// The words of the table, 64 bits each. The table itself stays on the host.
enum PeerWord : int32_t {
  kPeerMagicWord = 0,
  kPeerTpRank,
  kPeerTpSize,
  kPeerSpinNs,   // a wait that takes longer is given up
  kPeerIsTrial,  // nonzero: a given-up wait is recorded in control; zero: the kernel traps
  kPeerOneShotOffset,  // offsets of areas are in bytes from the start of a buffer
  kPeerOneShotBytes,   // largest message
  kPeerReduceOffset,
  kPeerSpreadOffset,
  kPeerPieceBytes,  // largest piece
  kPeerGatherOffset,
  kPeerGatherBytes,  // largest part of a rank
  kPeerTokensOffset,
  kPeerBuffers,  // the buffers of all ranks, at the addresses where this process has mapped them
  kPeerWords = kPeerBuffers + kMaxTpSize,
};
constexpr int64_t kPeerMagic = 0x70656572;  // "peer"

// The words of the control area, 32 bits each, all zero at first. Only the owner writes those
// before kControlReduceFlags; the other ranks write the rest. An op counts its rounds, and a
// round's number is one more than that of the op's last round; it may wrap around.
enum ControlWord : int32_t {
  kControlRounds = 0,  // [kMaxRoundCtas]: which of the 3 one-shot rounds comes next
  kControlReduced = kControlRounds + kMaxRoundCtas,  // [kMaxFlagCtas]: the last round of two-shot
  kControlGathered = kControlReduced + kMaxFlagCtas,   // [kMaxFlagCtas]: the last round of gather
  kControlTold = kControlGathered + kMaxFlagCtas,      // the last round of broadcast_tokens
  kControlIsGivenUp,                                   // 1 once a wait of a trial has been given up
  // [kMaxTpSize, kMaxFlagCtas]: the round whose pieces have come.
  kControlReduceFlags = kControlTold + 64,
  kControlSpreadFlags = kControlReduceFlags + kMaxTpSize * kMaxFlagCtas,  // the same for spread
  kControlGatherFlags = kControlSpreadFlags + kMaxTpSize * kMaxFlagCtas,  // the same for gather
  // [kMaxFlagCtas]: the round the leader is done with.
  kControlGatherAcks = kControlGatherFlags + kMaxTpSize * kMaxFlagCtas,
  // [kMaxTpSize]: the round a rank has received.
  kControlTokenAcks = kControlGatherAcks + kMaxFlagCtas,
  kControlWords = kControlTokenAcks + 64,
};

// The index of the part that rank `source` writes, among the parts of the others in the buffer of
// `owner`.
PYSERVE_HOST_DEVICE constexpr int32_t part_of(int32_t source, int32_t owner) {
  return source - (source > owner);
}

}  // namespace pyserve
