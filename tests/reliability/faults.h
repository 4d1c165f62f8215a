// What the preloaded files share; nothing of it is seen outside.
#pragma once
#include <dlfcn.h>

#pragma GCC visibility push(hidden)
enum { COUNT, KILL, FAIL, SHORT, RECORD };
extern int plan;

int found(int handle, const char* path, char* to);
int step(const char* name);
#pragma GCC visibility pop

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
