/** All ops: they check shapes and dtypes, enqueue and return. Outputs live in the scope given first. */
export * from './ops/math.js';
export * from './ops/layers.js';
export * from './ops/experts.js';
export * from './ops/quant.js';
export * from './ops/train.js';
export * from './ops/collective.js';
