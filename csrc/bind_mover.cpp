// The binding of csrc/mover.h. elo_engine.checkpoint.mover is its checked interface and its twin in Python.
#include "bind_mover.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <vector>

#include "mover.h"

namespace py = pybind11;

namespace elo {
namespace {

// A forked child that ends must not join its parent's threads.
struct Forget {
  void operator()(Mover* mover) const {
    if (mover->owned()) delete mover;
  }
};
using Holder = std::unique_ptr<Mover, Forget>;

Holder make(int64_t slots, int64_t slot_bytes, int threads, const std::vector<std::array<int64_t, 3>>& faults) {
  if (faults.empty()) return Holder(new Mover(slots, slot_bytes, threads, std::make_unique<SystemCalls>()));
  std::vector<Fault> plan;
  for (const auto& [call, error, limit] : faults) {
    if (call < -1 || error < -64 || error > 4095 || limit < 0) throw std::invalid_argument("mover: no such fault");
    plan.push_back({call, static_cast<int>(error), limit});
  }
  return Holder(new Mover(slots, slot_bytes, threads, std::make_unique<FaultyCalls>(std::move(plan))));
}

Way way_of(int way) {
  if (way < 0 || way > 2) throw std::invalid_argument("mover: no such way to read");
  return static_cast<Way>(way);
}

// Waits with the GIL released and looks for Ctrl-C in between.
py::tuple wait(Mover& mover, int64_t number) {
  Transfer result;
  for (;;) {
    bool there;
    {
      py::gil_scoped_release release;
      there = mover.wait(number, 0.1, &result);
    }
    if (there) break;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
  return py::make_tuple(result.error, result.ended, result.at, result.skip, result.transferred, static_cast<int>(result.way));
}

}  // namespace

void bind_mover(py::module_& m) {
  py::class_<Mover, Holder>(m, "Mover")
      .def(py::init(&make), py::arg("slots"), py::arg("slot_bytes"), py::arg("threads"), py::arg("faults"))
      .def("acquire",
           [](Mover& self) {
             const Slot slot = self.acquire();
             return py::make_tuple(slot.index, slot.generation);
           })
      .def("release", [](Mover& self, int64_t slot, uint64_t generation) { self.release({slot, generation}); })
      .def("fill",
           [](Mover& self, int64_t slot, uint64_t generation, int fd, int direct_fd, int64_t offset, int64_t length, int way) {
             return self.fill({slot, generation}, fd, direct_fd, offset, length, way_of(way));
           })
      .def("into",
           [](Mover& self, uintptr_t to, int64_t capacity, int fd, int direct_fd, int64_t offset, int64_t length, int way) {
             return self.into(reinterpret_cast<char*>(to), capacity, fd, direct_fd, offset, length, way_of(way));
           })
      .def("store",
           [](Mover& self, int64_t slot, uint64_t generation, int fd, int64_t offset, int64_t length) {
             return self.store({slot, generation}, fd, offset, length);
           })
      .def("wait", &wait)
      .def("drain", &Mover::drain, py::call_guard<py::gil_scoped_release>())
      // The ring's memory, which keeps the mover alive.
      .def(
          "memory",
          [](Mover& self) { return py::memoryview::from_memory(self.memory(), self.slots() * self.slot_bytes()); },
          py::keep_alive<0, 1>());
}

}  // namespace elo
