import { fuzzEach } from './suite.js';
import { pickles } from './targets.js';

fuzzEach(pickles);
