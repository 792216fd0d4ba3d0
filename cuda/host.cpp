// The module _host: the C++ that Python's side of a step needs without torch. It packs a StepInput
// (common/step.h), whose numpy twin is pack_step in pyserve/ops/reference.py, and it has the thread
// that waits for the steps on a CUDA device.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#include "common/step.h"
#include "completion.h"

namespace py = pybind11;

namespace pyserve {
namespace {

// Appends words to the buffer. Beyond its end it only counts them, so that the error can say how
// many are needed.
class Writer {
 public:
  Writer(int32_t* words, int64_t capacity) : words_(words), capacity_(capacity) {}

  void put(int32_t word) {
    if (size_ < capacity_) words_[size_] = word;
    ++size_;
  }

  void put_bytes(const char* bytes, int64_t num_bytes) {
    const int64_t num_words = num_bytes / static_cast<int64_t>(sizeof(int32_t));
    if (size_ + num_words <= capacity_) std::memcpy(words_ + size_, bytes, num_bytes);
    size_ += num_words;
  }

  int64_t size() const { return size_; }

 private:
  int32_t* words_;
  int64_t capacity_;
  int64_t size_ = 0;
};

int32_t to_int32(PyObject* item, const char* what) {
  const long value = PyLong_AsLong(item);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  if (value < INT32_MIN || value > INT32_MAX) {
    throw py::value_error(std::string(what) + " " + std::to_string(value) + " is not an int32");
  }
  return static_cast<int32_t>(value);
}

PyObject* item(const py::list& list, int64_t i) { return PyList_GET_ITEM(list.ptr(), i); }

struct RowTotals {
  int64_t num_tokens = 0;
  int64_t num_samples = 0;
  int32_t max_query_len = 0;
};

RowTotals put_rows(const py::list& row_slots, const py::list& query_lens,
                   const py::list& host_tokens, const py::list& row_samples, Writer& out) {
  RowTotals totals;
  int64_t tokens_offset = 0;
  for (int64_t r = 0; r < static_cast<int64_t>(row_slots.size()); ++r) {
    PyObject* ids = item(host_tokens, r);
    const bool is_known = ids != Py_None;
    if (is_known && !PyList_Check(ids)) throw py::type_error("host_tokens must hold lists or None");
    const int64_t num_ids = is_known ? PyList_GET_SIZE(ids) : 1;
    const int32_t query_len = to_int32(item(query_lens, r), "query_len");
    if (query_len != num_ids) {
      throw py::value_error("query_len " + std::to_string(query_len) +
                            " is not the number of the row's tokens");
    }
    const int is_sampled = PyObject_IsTrue(item(row_samples, r));
    if (is_sampled < 0) throw py::error_already_set();
    out.put(to_int32(item(row_slots, r), "row slot"));
    out.put(query_len);
    out.put(is_known ? static_cast<int32_t>(tokens_offset) : -1);
    out.put(is_sampled);
    if (is_known) tokens_offset += num_ids;
    totals.num_tokens += query_len;
    totals.num_samples += is_sampled;
    totals.max_query_len = std::max(totals.max_query_len, query_len);
  }
  return totals;
}

void put_ints(PyObject* list, const char* what, Writer& out) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    out.put(to_int32(PyList_GET_ITEM(list, i), what));
  }
}

void put_records(const py::list& records, Writer& out) {
  for (const py::handle& record : records) {
    if (!PyBytes_Check(record.ptr())) throw py::type_error("slot_updates must hold bytes");
    const Py_ssize_t num_bytes = PyBytes_GET_SIZE(record.ptr());
    if (num_bytes < kSlotUpdateWords * 4 || num_bytes % 4 != 0) {
      throw py::value_error("a slot update of " + std::to_string(num_bytes) + " bytes");
    }
    out.put_bytes(PyBytes_AS_STRING(record.ptr()), num_bytes);
  }
}

int64_t pack_step(const py::buffer& buffer, const py::list& row_slots, const py::list& query_lens,
                  const py::list& host_tokens, const py::list& row_samples,
                  const py::list& block_updates, const py::list& slot_updates,
                  const py::list& adapter_starts) {
  const py::buffer_info info = buffer.request(/*writable=*/true);
  if (info.ndim != 1 || info.itemsize != 4 || info.strides[0] != 4) {
    throw py::value_error("buffer must be a contiguous int32 vector");
  }
  const size_t num_rows = row_slots.size();
  if (query_lens.size() != num_rows || host_tokens.size() != num_rows ||
      row_samples.size() != num_rows) {
    throw py::value_error("row_slots, query_lens, host_tokens and row_samples differ in length");
  }
  if (block_updates.size() % kBlockUpdateWords != 0) {
    throw py::value_error("block_updates must be flat triples (slot, index, block id)");
  }
  int32_t header[kHeaderWords] = {};
  Writer out(static_cast<int32_t*>(info.ptr), info.shape[0]);
  for (int32_t word : header) out.put(word);
  put_ints(adapter_starts.ptr(), "adapter start", out);
  auto mark = [&](HeaderWord word) { header[word] = static_cast<int32_t>(out.size()); };
  mark(kHeaderRowsOffset);
  const RowTotals totals = put_rows(row_slots, query_lens, host_tokens, row_samples, out);
  mark(kHeaderTokensOffset);
  for (size_t r = 0; r < num_rows; ++r) {
    PyObject* ids = item(host_tokens, static_cast<int64_t>(r));
    if (ids != Py_None) put_ints(ids, "token id", out);
  }
  mark(kHeaderBlockUpdatesOffset);
  put_ints(block_updates.ptr(), "block update", out);
  mark(kHeaderSlotUpdatesOffset);
  put_records(slot_updates, out);
  mark(kHeaderNumWords);
  if (out.size() > info.shape[0]) {
    throw py::value_error("the step needs " + std::to_string(out.size()) +
                          " words, the buffer has " + std::to_string(info.shape[0]));
  }
  header[kHeaderMagic] = kStepMagic;
  header[kHeaderNumRows] = static_cast<int32_t>(num_rows);
  header[kHeaderNumTokens] = static_cast<int32_t>(totals.num_tokens);
  header[kHeaderNumSamples] = static_cast<int32_t>(totals.num_samples);
  header[kHeaderNumBlockUpdates] = static_cast<int32_t>(block_updates.size() / kBlockUpdateWords);
  header[kHeaderNumSlotUpdates] = static_cast<int32_t>(slot_updates.size());
  header[kHeaderMaxQueryLen] = totals.max_query_len;
  if (adapter_starts.size() > 0) {
    header[kHeaderNumAdapterSlots] = static_cast<int32_t>(adapter_starts.size()) - 1;
  }
  std::memcpy(info.ptr, header, sizeof header);
  return out.size();
}

// The constants of common/step.h, which a test compares with the Python twin.
py::dict step_layout() {
  py::dict d;
#define PYSERVE_PUT(name) d[#name] = static_cast<int64_t>(name)
  PYSERVE_PUT(kStepMagic);
  PYSERVE_PUT(kHeaderMagic);
  PYSERVE_PUT(kHeaderNumRows);
  PYSERVE_PUT(kHeaderNumTokens);
  PYSERVE_PUT(kHeaderNumSamples);
  PYSERVE_PUT(kHeaderRowsOffset);
  PYSERVE_PUT(kHeaderTokensOffset);
  PYSERVE_PUT(kHeaderNumBlockUpdates);
  PYSERVE_PUT(kHeaderBlockUpdatesOffset);
  PYSERVE_PUT(kHeaderNumSlotUpdates);
  PYSERVE_PUT(kHeaderSlotUpdatesOffset);
  PYSERVE_PUT(kHeaderNumWords);
  PYSERVE_PUT(kHeaderMaxQueryLen);
  PYSERVE_PUT(kHeaderNumAdapterSlots);
  PYSERVE_PUT(kHeaderWords);
  PYSERVE_PUT(kRowSlot);
  PYSERVE_PUT(kRowQueryLen);
  PYSERVE_PUT(kRowTokensOffset);
  PYSERVE_PUT(kRowSample);
  PYSERVE_PUT(kRowWords);
  PYSERVE_PUT(kBlockUpdateSlot);
  PYSERVE_PUT(kBlockUpdateIndex);
  PYSERVE_PUT(kBlockUpdateBlockId);
  PYSERVE_PUT(kBlockUpdateWords);
  PYSERVE_PUT(kSlotNumComputed);
  PYSERVE_PUT(kSlotLastToken);
  PYSERVE_PUT(kSlotMinTotalLen);
  PYSERVE_PUT(kSlotHasPenalties);
  PYSERVE_PUT(kSlotTemperature);
  PYSERVE_PUT(kSlotTopP);
  PYSERVE_PUT(kSlotMinP);
  PYSERVE_PUT(kSlotTopK);
  PYSERVE_PUT(kSlotRepetitionPenalty);
  PYSERVE_PUT(kSlotPresencePenalty);
  PYSERVE_PUT(kSlotFrequencyPenalty);
  PYSERVE_PUT(kSlotSeedLow);
  PYSERVE_PUT(kSlotSeedHigh);
  PYSERVE_PUT(kSlotSampleIndex);
  PYSERVE_PUT(kSlotNumBias);
  PYSERVE_PUT(kSlotNumStop);
  PYSERVE_PUT(kSlotHeaderWords);
  PYSERVE_PUT(kMaxLogitBias);
  PYSERVE_PUT(kMaxStopTokenIds);
  PYSERVE_PUT(kSlotBiasIds);
  PYSERVE_PUT(kSlotBiasValues);
  PYSERVE_PUT(kSlotStopIds);
  PYSERVE_PUT(kSlotWords);
  PYSERVE_PUT(kSlotUpdateNumWords);
  PYSERVE_PUT(kSlotUpdateSlot);
  PYSERVE_PUT(kSlotUpdateNumPromptTokens);
  PYSERVE_PUT(kSlotUpdateNumOutputTokens);
  PYSERVE_PUT(kSlotUpdateWords);
  PYSERVE_PUT(kInPrompt);
  PYSERVE_PUT(kMaxTokenCount);
#undef PYSERVE_PUT
  return d;
}

// A tuple (step id, name of the CUDA error or "") for each step that has ended.
py::list drain(CompletionThread& thread) {
  py::list completions;
  for (const Completion& completion : thread.drain()) {
    completions.append(py::make_tuple(completion.step_id, completion.error));
  }
  return completions;
}

}  // namespace
}  // namespace pyserve

PYBIND11_MODULE(_host, m) {
  py::class_<pyserve::CompletionThread>(m, "CompletionThread")
      .def(py::init<const std::string&, int>())
      .def("fileno", &pyserve::CompletionThread::fileno)
      .def("watch", &pyserve::CompletionThread::watch)
      .def("drain", &pyserve::drain)
      .def("close", &pyserve::CompletionThread::close, py::call_guard<py::gil_scoped_release>());
  m.def("pack_step", &pyserve::pack_step);
  m.def("step_layout", &pyserve::step_layout);
}
