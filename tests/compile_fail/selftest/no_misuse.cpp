// expect: anything
int harmless();
