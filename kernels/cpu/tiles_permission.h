// The registers of AMX.
#pragma once

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>

namespace surgeon {

// A process has to ask Linux for them once, on behalf of all its threads.
inline bool may_use_tiles() {
  constexpr int REQUEST = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
  return granted;
}

}  // namespace surgeon
#endif
