// CompletionThread waits for CUDA events outside the event loop and reports each through an
// eventfd.
//
// A host function on the stream (cudaLaunchHostFunc) would not do, because CUDA does not call it
// after an error. The driver is opened at run time, so that the same binary loads on a machine
// without a driver.
#pragma once

#include <dlfcn.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace pyserve {

// The functions of the CUDA driver that are used here, with the C signatures of its documentation.
struct CudaDriver {
  explicit CudaDriver(const std::string& library) {
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) throw std::runtime_error("cannot open " + library);
    auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
      if (function == nullptr) throw std::runtime_error(library + " has no " + name);
    };
    find(init, "cuInit");
    find(get_device, "cuDeviceGet");
    find(retain_context, "cuDevicePrimaryCtxRetain");
    find(set_context, "cuCtxSetCurrent");
    find(synchronize_event, "cuEventSynchronize");
    find(get_error_name, "cuGetErrorName");
  }

  std::string error_name(int error) const {
    const char* name = nullptr;
    if (get_error_name(error, &name) != 0 || name == nullptr) return std::to_string(error);
    return name;
  }

  int (*init)(unsigned flags);
  int (*get_device)(int* device, int ordinal);
  int (*retain_context)(void** context, int device);
  int (*set_context)(void* context);
  int (*synchronize_event)(void* event);
  int (*get_error_name)(int error, const char** name);
};

// A step whose event has completed or failed: `error` is empty, or the name of the CUresult.
struct Completion {
  int64_t step_id;
  std::string error;
};

class CompletionThread {
 public:
  // Throws std::runtime_error where the driver or the device is not available.
  CompletionThread(const std::string& driver_library, int device_ordinal)
      : state_(std::make_shared<State>(driver_library, device_ordinal)) {
    thread_ = std::thread([state = state_] { state->run(); });
  }

  ~CompletionThread() { close(); }

  // The eventfd, which is readable while `drain` has something to return.
  int fileno() const { return state_->event_fd; }

  // Queues a CUevent to wait for, behind those queued earlier. The event must live until its
  // completion.
  void watch(int64_t step_id, uintptr_t event) {
    {
      std::lock_guard lock(state_->mutex);
      state_->waiting.emplace_back(step_id, reinterpret_cast<void*>(event));
    }
    state_->wake.notify_one();
  }

  // All completions since the last call.
  std::vector<Completion> drain() {
    uint64_t count;
    // Fails with EAGAIN where nothing has completed.
    (void)!read(state_->event_fd, &count, sizeof count);
    std::lock_guard lock(state_->mutex);
    return std::exchange(state_->completed, {});
  }

  // Ends the thread. If it waits for an event that does not come within 200 ms, it is detached and
  // left behind.
  void close() {
    if (!thread_.joinable()) return;
    std::unique_lock lock(state_->mutex);
    state_->is_closing = true;
    state_->wake.notify_one();
    const bool has_ended = state_->ended.wait_for(lock, std::chrono::milliseconds(200),
                                                  [&] { return state_->has_ended; });
    lock.unlock();
    has_ended ? thread_.join() : thread_.detach();
  }

 private:
  // What owner and thread share; the thread may outlive its owner.
  struct State {
    State(const std::string& library, int device_ordinal) : driver(library) {
      int device = 0;
      check(driver.init(0), "cuInit");
      check(driver.get_device(&device, device_ordinal), "cuDeviceGet");
      check(driver.retain_context(&context, device), "cuDevicePrimaryCtxRetain");
      event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
      if (event_fd < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
    }

    ~State() { ::close(event_fd); }

    void check(int error, const char* what) const {
      if (error != 0) throw std::runtime_error(std::string(what) + ": " + driver.error_name(error));
    }

    void run() {
      int error = driver.set_context(context);
      std::unique_lock lock(mutex);
      while (true) {
        wake.wait(lock, [&] { return is_closing || !waiting.empty(); });
        if (is_closing) break;
        const auto [step_id, event] = waiting.front();
        waiting.pop_front();
        lock.unlock();
        // After an error the context is lost, and every later wait would fail with the same error.
        if (error == 0) error = driver.synchronize_event(event);
        lock.lock();
        completed.push_back({step_id, error == 0 ? "" : driver.error_name(error)});
        const uint64_t one = 1;
        (void)!write(event_fd, &one, sizeof one);
      }
      has_ended = true;
      ended.notify_all();
    }

    CudaDriver driver;
    void* context = nullptr;
    int event_fd = -1;
    std::mutex mutex;
    std::condition_variable wake, ended;
    std::deque<std::pair<int64_t, void*>> waiting;
    std::vector<Completion> completed;
    bool is_closing = false;
    bool has_ended = false;
  };

  std::shared_ptr<State> state_;
  std::thread thread_;
};

}  // namespace pyserve
