// What packing means on every device: fastcompress/reference/pack.py.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "rule.h"

namespace fastcompress {

// Label of a row that takes no part in the loss.
constexpr int64_t kIgnoredLabel = -100;

// Most rows that can be packed: each audio takes the place of at least one row.
FASTCOMPRESS_HD inline int64_t pack_bound(int64_t num_rows, int64_t num_audios, int64_t num_audio_rows) {
  return (num_rows > num_audios ? num_rows - num_audios : 0) + num_audio_rows;
}

// The label of a packed row that was the row `source` of the input: the first of a sequence has nothing to be predicted
// from, and only text has labels.
FASTCOMPRESS_HD inline int64_t packed_label(int64_t source, bool is_first, const int32_t* row_group, int64_t num_rows,
                                            const int64_t* labels) {
  const bool is_text = source >= 0 && source < num_rows && row_group[source] == kKeepRow;
  return is_text && !is_first ? labels[source] : kIgnoredLabel;
}

}  // namespace fastcompress
