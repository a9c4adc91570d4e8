// glibc 2.32 added this flag, and libstdc++'s headers read it where they were compiled with 2.32 or newer. A definition of our own, which
// the linker prefers, lets the library load with glibc 2.28 (manylinux_2_28). 0 says that there may be other threads: counters of
// shared_ptr are then always atomic.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
