/** What `convert --fuse` does: q, k, v and gate, up as one matrix; such matrices as their linears; consecutive linears as one. */
export const fuses = ['qkv', 'gate-up', 'split', 'fold'] as const;
export type Fuse = (typeof fuses)[number];
export const fusings = ['qkv', 'gate-up'] as const;
