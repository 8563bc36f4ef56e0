// Copy out of a file's memory mapping without dying when the file is shortened meanwhile.
#pragma once

#include <cstddef>

namespace elo {

// memcpy whose reads may hit a page behind the end of the mapped file: false then, where a plain memcpy ends in SIGBUS.
bool guarded_copy(void* to, const void* from, size_t count);

}  // namespace elo
