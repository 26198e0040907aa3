// expect: the words of another error
#ifdef MISUSE
static_assert(sizeof(char) == 2, "these words");
#endif
