/**
 * Golden pages: what the page format, version 1, makes of known tokens. Everything here comes from test/reference, so that
 * it holds any other program to account. `make.ts` writes the files; a change of them is a change of the format.
 */
import { createHash } from 'node:crypto';
import { ReferenceHead, type HeadScheme } from '../reference/cache';
import { buildPage, type BuiltPage } from '../reference/pages';
import { type Group, type Mode, type TensorSpec } from '../reference/types';
import { hardTokens, hardValues } from '../support/hard';
import { INNERQ, ROTATED, calibrated } from '../support/heads';
import { Random } from '../support/random';

/** The version of the page format that the files in this folder are of. */
export const GOLDEN_VERSION = 1;

/** Tokens of every case: a partly filled page, three sub-blocks of values. */
const QUANTISED = 100;

export interface GoldenCase {
  readonly name: string;
  readonly scheme: HeadScheme;
  readonly seed: number;
  /** Whether the bytes themselves are kept, not only their hash. */
  readonly whole: boolean;
}

/** Inputs [tokens][headDim] of a case. */
export interface GoldenInput {
  readonly keys: readonly Float32Array[];
  readonly values: readonly Float32Array[];
}

/** One line of the manifest. */
export interface GoldenEntry {
  readonly name: string;
  readonly seed: number;
  readonly tokens: number;
  readonly headDim: number;
  readonly bytes: number;
  /** SHA-256 of the binary16 inputs, and of the page followed by its compact zero points of K and V. */
  readonly inputs: string;
  readonly page: string;
  /** File with those bytes, where they are kept. */
  readonly file?: string;
}

export interface GoldenManifest {
  readonly formatVersion: number;
  readonly pages: readonly GoldenEntry[];
}

const GROUPS: readonly Group[] = ['channels32', 'channels64', 'token', 'tokens32'];
const MODES: readonly Mode[] = [
  'midRise',
  'zeroLevel',
  'signedMax',
  'asymmetric',
  'hybrid',
  'hybridReleased',
];

/** docs/format.md, sections 2 and 3: what keys or values may be stored as. */
function specsOf(tensor: 'key' | 'value'): TensorSpec[] {
  const all: TensorSpec[] = [{ bits: 16, group: 'token', mode: 'midRise' }];
  for (const bits of [1, 2, 3, 4, 8] as const)
    for (const group of GROUPS)
      for (const mode of MODES) {
        if (tensor === 'key' && (bits === 1 || group === 'tokens32')) continue;
        if (bits === 1 && mode !== 'midRise' && mode !== 'asymmetric') continue;
        all.push({ bits, group, mode });
      }
  return all;
}

export const keySpecs = specsOf('key');
export const valueSpecs = specsOf('value');

const nameOf = ({ bits, group, mode, outliers = 0 }: TensorSpec) =>
  bits === 16 ? '16' : `${bits}-${group}-${mode}${outliers > 0 ? `-o${outliers}` : ''}`;

/** Every storage of values with some storage of keys, all of them used; head sizes with whole and short groups. */
function specCases(): GoldenCase[] {
  return valueSpecs.map((value, i) => {
    const key = keySpecs[(5 * i + 2) % keySpecs.length]!;
    const headDim = [64, 80, 96][i % 3]!;
    const name = `k${nameOf(key)}_v${nameOf(value)}_d${headDim}`;
    return { name, scheme: { headDim, key, value, sink: 3, recent: 0 }, seed: 1000 + i, whole: false };
  });
}

/** A handful whose bytes are kept: together they have every width, group and mode. */
function wholeCases(): GoldenCase[] {
  const spec = (bits: TensorSpec['bits'], group: Group, mode: Mode): TensorSpec => ({ bits, group, mode });
  const pairs: [TensorSpec, TensorSpec][] = [
    [spec(2, 'token', 'midRise'), spec(2, 'token', 'midRise')],
    [spec(3, 'channels32', 'zeroLevel'), spec(3, 'tokens32', 'zeroLevel')],
    [spec(3, 'channels32', 'hybrid'), spec(2, 'tokens32', 'hybrid')],
    [spec(4, 'channels32', 'signedMax'), spec(4, 'channels64', 'signedMax')],
    [spec(4, 'channels64', 'asymmetric'), spec(1, 'tokens32', 'asymmetric')],
    [spec(2, 'channels64', 'hybridReleased'), spec(3, 'tokens32', 'hybridReleased')],
    [spec(8, 'channels32', 'zeroLevel'), spec(8, 'token', 'asymmetric')],
    [spec(16, 'token', 'midRise'), spec(1, 'token', 'midRise')],
  ];
  return pairs.map(([key, value], i) => ({
    name: `whole_k${nameOf(key)}_v${nameOf(value)}`,
    scheme: { headDim: 64, key, value, sink: 3, recent: 0 },
    seed: 1 + i,
    whole: true,
  }));
}

/** Treatments before rounding: statistics of the sequence, rotation, half whitening, feedback. */
function treatedCases(): GoldenCase[] {
  return [
    { name: 'innerq', scheme: INNERQ },
    { name: 'rotated', scheme: ROTATED },
    { name: 'calibrated_half', scheme: calibrated('half') },
    { name: 'calibrated_adjacent_d80', scheme: calibrated('adjacent', 80) },
  ].map((one, i) => ({ ...one, seed: 2000 + i, whole: false }));
}

export const goldenCases: readonly GoldenCase[] = [...wholeCases(), ...treatedCases(), ...specCases()];

/** Outliers with every group of channels and mode, of keys and of values, in every head size; the first two are kept. */
function outlierCases(): GoldenCase[] {
  const formats = GROUPS.filter((group) => group !== 'tokens32').flatMap((group) =>
    MODES.map((mode) => ({ group, mode })),
  );
  const plain = formats.map((_, i): GoldenCase => {
    const outliers = (step: number) => 1 + ((i * step) % 8);
    const key: TensorSpec = { bits: ([2, 3, 4, 8] as const)[i % 4]!, ...formats[i]!, outliers: outliers(3) };
    const of = formats[(7 * i + 3) % formats.length]!;
    const single = i % 3 === 0 && (of.mode === 'midRise' || of.mode === 'asymmetric');
    const value: TensorSpec = {
      bits: single ? 1 : ([4, 2, 8, 3] as const)[i % 4]!,
      ...of,
      outliers: outliers(5),
    };
    const headDim = i < 2 ? 64 : ([64, 80, 96, 128, 256] as const)[i % 5]!;
    const name = `outliers_k${nameOf(key)}_v${nameOf(value)}_d${headDim}`;
    return { name, scheme: { headDim, key, value, sink: 3, recent: 0 }, seed: 3000 + i, whole: i < 2 };
  });
  const keep = ({ key, value, ...scheme }: HeadScheme, outliers: number): HeadScheme => ({
    ...scheme,
    key: { ...key, outliers },
    value: value.group === 'tokens32' ? value : { ...value, outliers },
  });
  return [
    ...plain,
    { name: 'outliers_rotated', scheme: keep(ROTATED, 2), seed: 3100, whole: false },
    { name: 'outliers_innerq', scheme: keep(INNERQ, 1), seed: 3101, whole: false },
  ];
}

/** By file: formats are added, so that what was written before stays as it is. */
export const goldenSets: Readonly<Record<string, readonly GoldenCase[]>> = {
  [`v${GOLDEN_VERSION}`]: goldenCases,
  [`v${GOLDEN_VERSION}.outliers`]: outlierCases(),
};

export function goldenInput({ scheme, seed }: GoldenCase): GoldenInput {
  const random = new Random(seed);
  const tokens = scheme.sink + scheme.recent + QUANTISED;
  const keys = hardTokens(random, tokens, scheme.headDim);
  return { keys, values: hardValues(random, tokens, scheme.headDim, scheme.sink) };
}

/** The reference's first page after these tokens. */
export function referencePage({ scheme }: GoldenCase, { keys, values }: GoldenInput): BuiltPage {
  const head = new ReferenceHead(scheme);
  keys.forEach((key, t) => head.append(key, values[t]!));
  return buildPage(head.page(0));
}

/** What is hashed and kept: the page, then the compact zero points of K and of V, little endian. */
export function goldenBytes(page: {
  bytes: Uint8Array;
  kZeros: ArrayLike<number>;
  vZeros: ArrayLike<number>;
}): Buffer {
  const zeros = [...Array.from(page.kZeros), ...Array.from(page.vZeros)];
  const tail = Buffer.alloc(2 * zeros.length);
  zeros.forEach((zero, i) => tail.writeUInt16LE(zero, 2 * i));
  return Buffer.concat([page.bytes, tail]);
}

export function sha256(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex');
}

export function goldenEntry(one: GoldenCase, input: GoldenInput, page: Buffer): GoldenEntry {
  const hash = createHash('sha256');
  for (const row of [...input.keys, ...input.values])
    hash.update(new Uint8Array(row.buffer, row.byteOffset, row.byteLength));
  return {
    name: one.name,
    seed: one.seed,
    tokens: input.keys.length,
    headDim: one.scheme.headDim,
    bytes: page.length,
    inputs: hash.digest('hex'),
    page: sha256(page),
    ...(one.whole && { file: `v${GOLDEN_VERSION}/${one.name}.bin` }),
  };
}
