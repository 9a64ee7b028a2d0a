import { fuzzEach } from './suite.js';
import { containers } from './targets.js';

fuzzEach(containers);
