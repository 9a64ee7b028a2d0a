import { models } from './model-targets.js';
import { fuzzEach } from './suite.js';

fuzzEach(models);
