// Movement: fill (the other movement ops stand in this file too).
#include "cpu.h"

using namespace dc;
