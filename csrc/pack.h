// Definitions of packing that all devices share; see fastcompress/reference/pack.py.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "rule.h"

namespace fastcompress {

// Label of a row that the loss ignores.
constexpr int64_t kIgnoredLabel = -100;

// Upper bound of the number of packed rows: each audio replaces at least one row of the input.
FASTCOMPRESS_HD inline int64_t pack_bound(int64_t num_rows, int64_t num_audios, int64_t num_audio_rows) {
  return (num_rows > num_audios ? num_rows - num_audios : 0) + num_audio_rows;
}

// Returns the label of the packed row that comes from row `source` of the input. Only text has labels, and the first
// row of a sequence has none because no row predicts it.
FASTCOMPRESS_HD inline int64_t packed_label(int64_t source, bool is_first, const int32_t* row_group, int64_t num_rows,
                                            const int64_t* labels) {
  const bool is_text = source >= 0 && source < num_rows && row_group[source] == kKeepRow;
  return is_text && !is_first ? labels[source] : kIgnoredLabel;
}

}  // namespace fastcompress
