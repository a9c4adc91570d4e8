// glibc 2.32 added this flag, and libstdc++'s headers read it where they were compiled with 2.32 or newer. A definition of our own, which
// the linker prefers, lets the library load with glibc 2.28 (manylinux_2_28). 0 says that there may be other threads: counters of
// shared_ptr are then always atomic.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// libstdc++ has these since GCC 9 and 11 (GLIBCXX_3.4.26 and 3.4.29), and its headers call them where they do not inline them: with
// definitions of our own the library loads with that of GCC 8 (manylinux_2_28 has GLIBCXX_3.4.24). Some of torch's libraries export such
// definitions too, which the linker would take, but no version of torch owes us that.
#include <new>
#include <sstream>

#if defined(__GLIBCXX__) && _GLIBCXX_RELEASE >= 11
template std::stringstream::basic_stringstream();
template std::ostringstream::basic_ostringstream();
template std::string std::stringbuf::str() const&;
template std::string std::stringbuf::str() &&;
template std::string std::stringstream::str() const&;
template std::string std::stringstream::str() &&;
template std::string std::ostringstream::str() const&;
template std::string std::ostringstream::str() &&;

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
#endif
