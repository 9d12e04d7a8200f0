#include "model/safetensors.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <tuple>

#include "common/check.h"

namespace avser {
namespace {

constexpr int64_t kFormat = 3;  // of other kinds; with ranges of int8 it is 2, without them 1
constexpr const char* kHeaderKey = "avser_fast";
constexpr const char* kCalibration = "calibration.";
constexpr uint64_t kMaxHeader = uint64_t{1} << 24;  // bytes; a header of this project has thousands

// Bytes of a file that can be opened and is no directory, device or pipe.
uint64_t size_of(const std::string& path, const std::string& where) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  AVSER_CHECK(status.type() != std::filesystem::file_type::not_found, model, where,
              ": expected a safetensors file, found no such file");
  AVSER_CHECK(!error, model, where, ": expected a file that can be read, got an error (", error.message(), ")");
  AVSER_CHECK(std::filesystem::is_regular_file(status), model, where, ": expected a safetensors file, got a ",
              std::filesystem::is_directory(status) ? "directory" : "device or pipe");
  const auto size = std::filesystem::file_size(path, error);
  AVSER_CHECK(!error, model, where, ": expected a file that can be read, got an error (", error.message(), ")");
  return size;
}

void read(std::ifstream& file, void* to, uint64_t bytes, const std::string& where) {
  file.read(static_cast<char*>(to), static_cast<std::streamsize>(bytes));
  AVSER_CHECK(static_cast<uint64_t>(file.gcount()) == bytes, model, where, ": expected ", bytes, " more bytes, got ",
              file.gcount());
}

// Pickles of protocol 2 and later start with 0x80 and its number, torch's own files with a zip header.
bool is_pickle(const unsigned char* head) {
  return (head[0] == 0x80 && head[1] >= 2 && head[1] <= 5) || std::memcmp(head, "PK\x03\x04", 4) == 0;
}

struct Entry {
  std::string name;
  std::vector<int64_t> shape;
  int64_t begin, end;  // bytes
};

// A list of whole numbers of at least 0.
std::vector<int64_t> counts(const Json* json, const std::string& what) {
  std::vector<int64_t> out;
  const auto* items = json != nullptr ? json->as<Json::Array>() : nullptr;
  AVSER_CHECK(items != nullptr, model, what, ": expected a list, got ", json != nullptr ? json->describe() : "none");
  for (const Json& item : *items) {
    const auto* count = item.as<int64_t>();
    AVSER_CHECK(count != nullptr && *count >= 0, model, what, ": expected whole numbers of at least 0, got ",
                item.describe());
    out.push_back(*count);
  }
  return out;
}

Entry read_entry(const std::string& name, const Json& json, const std::string& where) {
  const std::string what = cat(where, ": tensor '", name, "'");
  const auto* dtype = json.find("dtype");
  const auto* type = dtype != nullptr ? dtype->as<std::string>() : nullptr;
  AVSER_CHECK(type != nullptr && *type == "F32", model, what, ": expected dtype F32, got ",
              dtype != nullptr ? dtype->describe() : "none");
  Entry entry{name, counts(json.find("shape"), what + ": shape"), 0, 0};
  const auto offsets = counts(json.find("data_offsets"), what + ": data_offsets");
  AVSER_CHECK(offsets.size() == 2 && offsets[0] <= offsets[1], model, what,
              ": data_offsets: expected where it begins and ends, got ", offsets.size(), " number(s) or an end first");
  std::tie(entry.begin, entry.end) = std::tie(offsets[0], offsets[1]);
  int64_t bytes = sizeof(float);
  for (int64_t extent : entry.shape) {
    AVSER_CHECK(!__builtin_mul_overflow(bytes, extent, &bytes), model, what, ": expected a size in int64, got more");
  }
  AVSER_CHECK(entry.end - entry.begin == bytes, model, what, ": expected the ", bytes, " bytes of its shape, got ",
              entry.end - entry.begin);
  return entry;
}

// One tensor after the other, in the order of their places: no gap, no overlap, nothing after the last.
std::vector<Entry> read_entries(const Json& json, uint64_t data_bytes, const std::string& where) {
  std::vector<Entry> entries;
  for (const auto& [name, value] : *json.as<Json::Object>()) {
    if (name != "__metadata__") entries.push_back(read_entry(name, value, where));
  }
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return std::tie(a.begin, a.end) < std::tie(b.begin, b.end); });
  int64_t at = 0;
  for (const Entry& entry : entries) {
    AVSER_CHECK(entry.begin == at, model, where, ": tensor '", entry.name, "': expected it to begin at byte ", at,
                ", where the one before it ends, got ", entry.begin);
    at = entry.end;
  }
  AVSER_CHECK(static_cast<uint64_t>(at) == data_bytes, model, where, ": expected the ", at,
              " bytes of its tensors, got ", data_bytes);
  return entries;
}

Json read_header(const Json& json, const std::string& where) {
  const Json* metadata = json.find("__metadata__");
  const Json* found = metadata != nullptr ? metadata->find(kHeaderKey) : nullptr;
  AVSER_CHECK(found != nullptr && found->as<std::string>() != nullptr, model, where, ": expected the header '",
              kHeaderKey, "', got a safetensors file of another program");
  Json header = parse_json(*found->as<std::string>(), ErrorKind::model, where + ": header");

  const Json* format = header.find("format");
  const auto* version = format != nullptr ? format->as<int64_t>() : nullptr;
  AVSER_CHECK(version != nullptr && *version >= 1 && *version <= kFormat, model, where, ": expected a format of 1 to ",
              kFormat, ", all that this version of avser_fast reads, got ",
              format != nullptr ? format->describe() : "none");
  const Json* kind = header.find("kind");
  const auto* name = kind != nullptr ? kind->as<std::string>() : nullptr;
  AVSER_CHECK(name != nullptr && *name == "mdscm", model, where,
              ": expected the kind 'mdscm', which scores speech by itself, got ",
              kind != nullptr ? kind->describe() : "none");
  const Json* card = header.find("card");
  AVSER_CHECK(card == nullptr || card->as<Json::Object>() != nullptr, model, where,
              ": expected the card to be an object, got ", card->describe());
  return header;
}

}  // namespace

ModelFile read_model_file(const std::string& path) {
  const std::string where = cat("model '", path, "'");
  const uint64_t size = size_of(path, where);
  std::ifstream file(path, std::ios::binary);
  AVSER_CHECK(file.is_open(), model, where, ": expected a file that can be read, got an error (",
              std::generic_category().message(errno), ")");

  unsigned char head[8];
  AVSER_CHECK(size >= sizeof head, model, where, ": expected a safetensors file, got ", size, " bytes");
  read(file, head, sizeof head, where);
  AVSER_CHECK(!is_pickle(head), model, where,
              ": expected a safetensors file, got a pickle, which could run code; convert a published checkpoint with "
              "avser_fast.import_av4ser");
  uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | head[i];
  AVSER_CHECK(header_bytes <= size - sizeof head && header_bytes <= kMaxHeader, model, where,
              ": expected a safetensors file with a header of at most ", std::min(size - sizeof head, kMaxHeader),
              " bytes, got ", header_bytes);

  std::string text(header_bytes, '\0');
  read(file, text.data(), header_bytes, where);
  const Json json = parse_json(text, ErrorKind::model, where);
  AVSER_CHECK(json.as<Json::Object>() != nullptr, model, where, ": expected an object of tensors, got ",
              json.describe());
  const uint64_t data_bytes = size - sizeof head - header_bytes;
  ModelFile model;
  model.header = read_header(json, where);
  const std::vector<Entry> entries = read_entries(json, data_bytes, where);
  model.data = Buffer(static_cast<int64_t>(data_bytes));
  read(file, model.data.data(), data_bytes, where);
  const float* floats = model.data.as<float>();
  for (const Entry& entry : entries) {
    const float* values = floats + entry.begin / static_cast<int64_t>(sizeof(float));
    const float* end = floats + entry.end / static_cast<int64_t>(sizeof(float));
    AVSER_CHECK(std::all_of(values, end, [](float x) { return std::isfinite(x); }), model, where, ": tensor '",
                entry.name, "': expected finite values, got NaN or infinity");
    if (entry.name.rfind(kCalibration, 0) != 0) {
      model.tensors[entry.name] = {values, entry.shape};
      continue;
    }
    const int64_t channels = entry.shape.size() == 2 ? entry.shape[1] : 0;
    AVSER_CHECK(channels > 0 && entry.shape[0] == 2, model, where, ": tensor '", entry.name,
                "': expected the lowest and the highest value of every channel, (2, channels), got another shape");
    for (int64_t c = 0; c < channels; ++c) {
      AVSER_CHECK(values[c] <= values[channels + c], model, where, ": tensor '", entry.name, "': channel ", c,
                  ": expected low <= high, got ", values[c], " and ", values[channels + c]);
    }
    model.calibration[entry.name.substr(std::strlen(kCalibration))] = {values, entry.shape};
  }
  return model;
}

}  // namespace avser
