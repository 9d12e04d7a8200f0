#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "common/check.h"
#include "gpu/emulated_runtime.h"
#include "gpu/launch.h"
#include "gpu/runtime.h"

namespace avser::gpu {
namespace {

using Work = std::function<void()>;

std::mutex guard;
DeviceInfo emulated{"emulated GPU", 9, 0, 132, 227 << 10, true};
std::map<char*, std::pair<char*, size_t>> mapped;  // where memory was given -> its pages

// What the calling thread records, per stream; queued work runs at once otherwise.
thread_local std::map<Stream, std::vector<Work>*> recording;

void queue(Stream stream, Work work) {
  const auto found = recording.find(stream);
  if (found != recording.end()) {
    found->second->push_back(std::move(work));
  } else {
    work();
  }
}

// Ends where a page that nobody may touch begins, and begins as NaN.
char* guarded(int64_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t used = (static_cast<size_t>(bytes > 0 ? bytes : 1) + 15) / 16 * 16;
  const size_t whole = (used + page - 1) / page * page;
  void* made = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (made == MAP_FAILED) throw std::bad_alloc();
  char* const begin = static_cast<char*>(made);
  mprotect(begin + whole, page, PROT_NONE);
  char* const at = begin + (whole - used);
  std::memset(at, 0xff, used);
  std::lock_guard<std::mutex> lock(guard);
  mapped[at] = {begin, whole + page};
  return at;
}

void release(char* at) {
  std::lock_guard<std::mutex> lock(guard);
  const auto found = mapped.find(at);
  munmap(found->second.first, found->second.second);
  mapped.erase(found);
}

}  // namespace

void set_emulated_device(const DeviceInfo& info) {
  std::lock_guard<std::mutex> lock(guard);
  emulated = info;
}

int device_count() { return 1; }
DeviceInfo device_info(int device) {
  AVSER_CHECK(device == 0, backend, "CUDA: expected GPU 0, the only emulated one, got ", device);
  std::lock_guard<std::mutex> lock(guard);
  return emulated;
}

OnDevice::OnDevice(int) : before_(0) {}
OnDevice::~OnDevice() { (void)before_; }

void FreeDevice::operator()(char* at) const { release(at); }
void FreePinned::operator()(char* at) const { release(at); }
DeviceMemory allocate_device(int64_t bytes) { return DeviceMemory(guarded(bytes), FreeDevice{0}); }
PinnedMemory allocate_pinned(int64_t bytes) { return PinnedMemory(guarded(bytes)); }

void FreeStream::operator()(void* stream) const { delete static_cast<int*>(stream); }
OwnedStream make_stream() { return OwnedStream(new int(0)); }
void synchronize(Stream) {}
bool is_capturing(Stream stream) { return recording.count(stream) != 0; }

WhileRecording::WhileRecording() : mode_(0) {}
WhileRecording::~WhileRecording() { (void)mode_; }

void copy_to_device(void* to, const void* from, int64_t bytes, Stream stream) {
  queue(stream, [=] { std::memcpy(to, from, static_cast<size_t>(bytes)); });
}
void copy_from_device(void* to, const void* from, int64_t bytes, Stream stream) {
  copy_to_device(to, from, bytes, stream);
}
void fill(void* at, int value, int64_t bytes, Stream stream) {
  queue(stream, [=] { std::memset(at, value, static_cast<size_t>(bytes)); });
}

void FreeGraph::operator()(void* graph) const { delete static_cast<std::vector<Work>*>(graph); }
void begin_capture(Stream stream) { recording[stream] = new std::vector<Work>; }
Graph end_capture(Stream stream) {
  Graph graph(recording.at(stream));
  recording.erase(stream);
  return graph;
}
void launch_graph(const Graph& graph, Stream stream) {
  for (const Work& work : *static_cast<std::vector<Work>*>(graph.get())) queue(stream, work);
}

void launch_emulated(const EmulatedLaunch& shape, Stream stream, std::function<void()> kernel) {
  queue(stream, [shape, kernel] { emulate(shape, kernel); });
}

bool is_emulated() { return true; }

}  // namespace avser::gpu
