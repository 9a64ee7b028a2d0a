/** Element types that a tensor can have in memory. Numbers are the native contract's (native/backend.h). */
export const dtypeCode = {
  f32: 0,
  bf16: 1,
  f16: 2,
  f64: 3,
  i8: 4,
  u8: 5,
  i16: 6,
  u16: 7,
  i32: 8,
  u32: 9,
  i64: 10,
  u64: 11,
  bool: 12,
  f8_e4m3: 13,
  f8_e5m2: 14,
} as const;

export type DType = keyof typeof dtypeCode;

const sizes: Record<DType, number> = {
  f32: 4,
  bf16: 2,
  f16: 2,
  f64: 8,
  i8: 1,
  u8: 1,
  i16: 2,
  u16: 2,
  i32: 4,
  u32: 4,
  i64: 8,
  u64: 8,
  bool: 1,
  f8_e4m3: 1,
  f8_e5m2: 1,
};

/** Bytes per element. */
export const dtypeSize = (dtype: DType): number => sizes[dtype];

export type FloatDType = 'f32' | 'bf16' | 'f16';

export function elementCount(shape: readonly number[]): number {
  let count = 1;
  for (const size of shape) count *= size;
  return count;
}
