/** Page bytes of native code against the reference's: equal, or where they first differ. */
import { type ReferenceHead } from '../reference/cache';
import { getHalf } from '../reference/half';
import { decodeOutliers } from '../reference/outliers';
import { buildPage, getCode, keyShape, pageOffsets, valueShape } from '../reference/pages';
import { type BuiltPage, type PageSpec } from '../reference/pages';
import { PAGE_TOKENS } from '../reference/types';

/** A page as native code hands it out. */
export interface NativePage {
  readonly bytes: Uint8Array;
  readonly keyZeros: ArrayLike<number>;
  readonly valueZeros: ArrayLike<number>;
}

/** What a page of a head has to be. */
export interface ExpectedPage {
  readonly built: BuiltPage;
  readonly spec: PageSpec;
}

export function expectedPage(head: ReferenceHead, page: number): ExpectedPage {
  const spec = head.page(page);
  return { built: buildPage(spec), spec };
}

/** Undefined when equal, else the first difference in words: section, slot, channel (or group). */
export function pageDifference(native: NativePage | null, { built, spec }: ExpectedPage): string | undefined {
  if (native === null) return 'missing';
  if (native.bytes.length !== built.bytes.length)
    return `${native.bytes.length} bytes instead of ${built.bytes.length}`;
  if (Buffer.compare(native.bytes, built.bytes) !== 0)
    return firstDifference(native.bytes, built.bytes, spec);
  return (
    zeroDifference('K', native.keyZeros, built.kZeros) ?? zeroDifference('V', native.valueZeros, built.vZeros)
  );
}

function zeroDifference(
  tensor: 'K' | 'V',
  native: ArrayLike<number>,
  expected: readonly number[],
): string | undefined {
  if (native.length !== expected.length)
    return `${tensor}: ${native.length} compact zero points instead of ${expected.length}`;
  const at = expected.findIndex((bits, i) => bits !== native[i]);
  return at < 0 ? undefined : `${tensor}: compact zero point ${at} is ${native[at]}, not ${expected[at]}`;
}

function firstDifference(native: Uint8Array, expected: Uint8Array, spec: PageSpec): string {
  const at = native.findIndex((byte, i) => byte !== expected[i]);
  const offsets = pageOffsets(spec);
  const names = [
    ...(['kCodes', 'kScales', 'kZeros', 'kOutliers'] as const),
    ...(['vCodes', 'vScales', 'vZeros', 'vOutliers'] as const),
  ] as const;
  for (const name of names) {
    const section = offsets[name];
    if (at < section.offset || at >= section.offset + section.length) continue;
    const [mine, theirs] = [native, expected].map((bytes) =>
      bytes.subarray(section.offset, section.offset + section.length),
    ) as [Uint8Array, Uint8Array];
    if (name.endsWith('Outliers')) return outlierDifference(name, mine, theirs, spec);
    return name.endsWith('Codes')
      ? codeDifference(name, mine, theirs, spec)
      : scaleDifference(name, mine, theirs, spec);
  }
  return `padding byte ${at} is ${native[at]}, not ${expected[at]}`;
}

type Name = Exclude<keyof ReturnType<typeof pageOffsets>, 'bytes'>;

function codeDifference(name: Name, native: Uint8Array, expected: Uint8Array, spec: PageSpec): string {
  const key = name === 'kCodes';
  const { bits } = key ? spec.kSpec : spec.vSpec;
  const shape = key ? keyShape(spec.headDim) : valueShape(spec.headDim);
  const code = (bytes: Uint8Array, slot: number, channel: number) =>
    bits === 16
      ? getHalf(bytes, slot * spec.headDim + channel)
      : getCode(bytes, bits, shape, key ? slot : channel, key ? channel : slot);
  for (let slot = 0; slot < PAGE_TOKENS; slot++)
    for (let channel = 0; channel < spec.headDim; channel++) {
      const [mine, theirs] = [code(native, slot, channel), code(expected, slot, channel)];
      if (mine !== theirs) return `${name}: slot ${slot}, channel ${channel}: code ${mine}, not ${theirs}`;
    }
  return `${name}: bytes differ but no code does`;
}

function outlierDifference(name: Name, native: Uint8Array, expected: Uint8Array, spec: PageSpec): string {
  const { outliers = 0 } = name.startsWith('k') ? spec.kSpec : spec.vSpec;
  const [mine, theirs] = [native, expected].map((bytes) => {
    const rows = decodeOutliers(bytes, PAGE_TOKENS * outliers);
    return rows.map((row) => row.map((o) => `${o.channel}: 0x${o.valueBits.toString(16)}`).join(', '));
  }) as [string[], string[]];
  const slot = mine.findIndex((row, i) => row !== theirs[i]);
  if (slot < 0) return `${name}: bytes differ but no row does`;
  return `${name}: slot ${slot}: ${mine[slot]}, not ${theirs[slot]}`;
}

function scaleDifference(name: Name, native: Uint8Array, expected: Uint8Array, spec: PageSpec): string {
  const { group } = name.startsWith('k') ? spec.kSpec : spec.vSpec;
  const index = Array.from({ length: native.length / 2 }, (_, i) => i).find(
    (i) => getHalf(native, i) !== getHalf(expected, i),
  )!;
  const where =
    group === 'tokens32'
      ? `sub-block ${Math.floor(index / spec.headDim)}, channel ${index % spec.headDim}`
      : `slot ${index % PAGE_TOKENS}, group ${Math.floor(index / PAGE_TOKENS)}`;
  const hex = (bytes: Uint8Array) => `0x${getHalf(bytes, index).toString(16)}`;
  return `${name}: ${where}: ${hex(native)}, not ${hex(expected)}`;
}
