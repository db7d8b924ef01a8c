// The Verilated core behind a C interface: register accesses and stream transfers, clock by clock.
#include <cstdint>
#include <cstring>
#include "Vgatelet_core.h"
#include "verilated.h"

namespace {
struct Core {
  VerilatedContext context;
  Vgatelet_core top{&context};
  uint64_t cycles = 0;
  uint64_t random = 1;

  // A small generator of our own, so that a seed gives the same waits everywhere.
  unsigned percent() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return static_cast<unsigned>((random >> 11) % 100);
  }
  void rise() { top.clk = 1; top.eval(); ++cycles; }
  void fall() { top.clk = 0; top.eval(); }
  void tick() { rise(); fall(); }
};
}  // namespace

extern "C" {
void* core_new() {
  Core* core = new Core;
  std::memset(&core->top.s_axis_tdata, 0, sizeof core->top.s_axis_tdata);
  core->top.resetn = 0;
  for (int i = 0; i < 4; ++i) core->tick();
  core->top.resetn = 1;
  core->tick();
  core->tick();
  return core;
}

void core_delete(void* handle) {
  Core* core = static_cast<Core*>(handle);
  core->top.final();
  delete core;
}

uint64_t core_cycles(void* handle) { return static_cast<Core*>(handle)->cycles; }

void core_write(void* handle, uint32_t address, uint32_t value) {
  Core& core = *static_cast<Core*>(handle);
  core.top.s_axi_awaddr = address;
  core.top.s_axi_awvalid = core.top.s_axi_wvalid = 1;
  core.top.s_axi_wdata = value;
  core.top.s_axi_wstrb = 15;
  core.top.s_axi_bready = 1;
  core.fall();
  while (!core.top.s_axi_awready) core.tick();
  core.tick();
  core.top.s_axi_awvalid = core.top.s_axi_wvalid = 0;
  core.fall();
  while (!core.top.s_axi_bvalid) core.tick();
  core.tick();
  core.tick();
}

uint32_t core_read(void* handle, uint32_t address) {
  Core& core = *static_cast<Core*>(handle);
  core.top.s_axi_araddr = address;
  core.top.s_axi_arvalid = 1;
  core.top.s_axi_rready = 1;
  core.fall();
  while (!core.top.s_axi_arready) core.tick();
  core.tick();
  core.top.s_axi_arvalid = 0;
  core.fall();
  while (!core.top.s_axi_rvalid) core.tick();
  const uint32_t value = core.top.s_axi_rdata;
  core.tick();
  return value;
}

// Sends one packet and, when `capacity` is not 0, receives until TLAST. A side waits in `*_wait`
// percent of the cycles. Returns the bytes received, or -1 when `limit` cycles did not do,
// -2 when more came than fits, -3 when valid data changed or went away before it was taken.
int64_t core_transfer(void* handle, const uint8_t* input, int64_t length, uint8_t* output,
                      int64_t capacity, unsigned send_wait, unsigned receive_wait, uint64_t seed,
                      int64_t limit) {
  Core& core = *static_cast<Core*>(handle);
  Vgatelet_core& top = core.top;
  const int64_t width = sizeof top.s_axis_tdata;
  core.random = seed * 2654435761u + 88172645463325252ull;
  int64_t sent = 0, received = 0;
  bool ended = capacity == 0, pending = false;
  uint8_t held[sizeof top.m_axis_tdata] = {};
  bool held_valid = false, held_last = false;
  for (int64_t cycle = 0; cycle < limit; ++cycle) {
    if (sent >= length && ended) {
      top.s_axis_tvalid = 0;
      top.m_axis_tready = 0;
      core.fall();
      return received;
    }
    // Valid, once high, stays until the beat is taken.
    if (!pending) pending = sent < length && core.percent() >= send_wait;
    top.s_axis_tvalid = pending;
    if (pending) {
      const int64_t beat = length - sent < width ? length - sent : width;
      uint8_t bytes[sizeof top.s_axis_tdata] = {};
      std::memcpy(bytes, input + sent, beat);
      std::memcpy(&top.s_axis_tdata, bytes, width);
      top.s_axis_tkeep = (uint64_t{1} << beat) - 1;
      top.s_axis_tlast = sent + beat >= length;
    }
    top.m_axis_tready = core.percent() >= receive_wait;
    core.fall();
    const bool taken = pending && top.s_axis_tready;
    if (held_valid && (!top.m_axis_tvalid || held_last != top.m_axis_tlast ||
                       std::memcmp(held, &top.m_axis_tdata, width) != 0)) {
      return -3;
    }
    held_valid = top.m_axis_tvalid && !top.m_axis_tready;
    held_last = top.m_axis_tlast;
    std::memcpy(held, &top.m_axis_tdata, width);
    if (top.m_axis_tvalid && top.m_axis_tready && !ended) {
      const int64_t beat = __builtin_popcountll(top.m_axis_tkeep);
      if (received + beat > capacity) return -2;
      std::memcpy(output + received, &top.m_axis_tdata, beat);
      received += beat;
      ended = top.m_axis_tlast;
    }
    core.rise();
    if (taken) {
      sent += width;
      pending = false;
    }
  }
  top.s_axis_tvalid = 0;
  top.m_axis_tready = 0;
  core.fall();
  return -1;
}
}
