// The pages of memory that weights lie in.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace surgeon {

// Ask the system to hold a part of the memory in large pages, and wait until it does. Weights of experts are read here and
// there, and with small pages their addresses are looked up as often as they are. Where the system does not do it, nothing
// changes.
inline void use_large_pages(const void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 1 << 21;
  constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, of Linux 6.1
  uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  begin = begin / PAGE * PAGE, end = (end + PAGE - 1) / PAGE * PAGE;
  for (uintptr_t page = begin; page < end; page += PAGE) madvise(reinterpret_cast<void*>(page), PAGE, COLLAPSE);
#endif
}

}  // namespace surgeon
