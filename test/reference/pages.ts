/**
 * Page bytes, element by element: where each code lives, where each section begins, how a page is put together.
 * Source: docs/format.md sections 2, 3, 7 and 8.
 */
import { putHalf } from './half';
import { encodeOutliers, outlierBytes, type Outlier } from './outliers';
import { type QuantisedBlock, type QuantisedToken } from './quantise';
import { channelGroups, isHybrid, PAGE_TOKENS, SUB_BLOCK_TOKENS, type Bits, type TensorSpec } from './types';

/** Rows and elements of a code matrix: K has 128 slots of D channels, V has D channels of 128 slots. */
export interface MatrixShape {
  readonly rows: number;
  readonly elements: number;
}

/** A run of `width` bits of a code: code bits [from, from + width) sit in byte `byte` at bit `shift`. */
interface CodePart {
  byte: number;
  shift: number;
  width: number;
  from: number;
}

export function keyShape(headDim: number): MatrixShape {
  return { rows: PAGE_TOKENS, elements: headDim };
}

export function valueShape(headDim: number): MatrixShape {
  return { rows: headDim, elements: PAGE_TOKENS };
}

/** Bytes of a code matrix; for 16 bits, of the binary16 values. */
export function codeBytes(bits: Bits, { rows, elements }: MatrixShape): number {
  return (rows * elements * bits) / 8;
}

/** The one or two places of a code (two only for classes 6 and 7 of 3 bits). */
export function codeParts(bits: Bits, { rows }: MatrixShape, row: number, element: number): CodePart[] {
  if (bits === 16) throw new Error('16 bits have no quads');
  const quad = Math.floor(element / 4);
  const lane = element % 4;
  const classes = { 1: 8, 2: 4, 3: 8, 4: 2, 8: 1 }[bits];
  const X = rows / classes;
  const x = row % X;
  const c = Math.floor(row / X);
  const planes = bits === 3 ? 3 : 1;
  const byteOf = (plane: number) => 4 * ((quad * planes + plane) * X + x) + lane;

  if (bits !== 3) return [{ byte: byteOf(0), shift: bits * c, width: bits, from: 0 }];
  if (c < 6) return [{ byte: byteOf(Math.floor(c / 2)), shift: 3 * (c % 2), width: 3, from: 0 }];
  return [
    { byte: byteOf(c - 6), shift: 6, width: 2, from: 1 },
    { byte: byteOf(2), shift: c, width: 1, from: 0 },
  ];
}

/** Writes one code; its bits may hold anything before. */
export function putCode(
  bytes: Uint8Array,
  bits: Bits,
  shape: MatrixShape,
  row: number,
  element: number,
  code: number,
): void {
  for (const { byte, shift, width, from } of codeParts(bits, shape, row, element)) {
    const mask = (1 << width) - 1;
    bytes[byte] = (bytes[byte]! & ~(mask << shift)) | (((code >> from) & mask) << shift);
  }
}

/** Reads one code. */
export function getCode(
  bytes: Uint8Array,
  bits: Bits,
  shape: MatrixShape,
  row: number,
  element: number,
): number {
  let code = 0;
  for (const { byte, shift, width, from } of codeParts(bits, shape, row, element))
    code |= ((bytes[byte]! >> shift) & ((1 << width) - 1)) << from;
  return code;
}

/** What a page holds. */
export interface PageSpec {
  readonly kSpec: TensorSpec;
  readonly vSpec: TensorSpec;
  readonly headDim: number;
}

/** A byte range of a page; length 0 if the section does not exist. */
export interface Section {
  readonly offset: number;
  readonly length: number;
}

/** Sections in page order and the size of the page, everything rounded up to 64 bytes. */
export interface PageOffsets {
  readonly kCodes: Section;
  readonly kScales: Section;
  readonly kZeros: Section;
  readonly kOutliers: Section;
  readonly vCodes: Section;
  readonly vScales: Section;
  readonly vZeros: Section;
  readonly vOutliers: Section;
  readonly bytes: number;
}

/** Scales of a page for one tensor. */
export function pageScales(spec: TensorSpec, headDim: number): number {
  if (spec.bits === 16) return 0;
  if (spec.group === 'tokens32') return (PAGE_TOKENS / SUB_BLOCK_TOKENS) * headDim;
  return PAGE_TOKENS * channelGroups(headDim, spec.group).length;
}

export function pageOffsets({ kSpec, vSpec, headDim }: PageSpec): PageOffsets {
  let offset = 0;
  const section = (length: number): Section => {
    const here = { offset, length };
    offset += Math.ceil(length / 64) * 64;
    return here;
  };
  const scaleBytes = (spec: TensorSpec) => 2 * pageScales(spec, headDim);
  const zeroBytes = (spec: TensorSpec) => (spec.mode === 'asymmetric' ? scaleBytes(spec) : 0);
  const outlierSection = ({ outliers = 0 }: TensorSpec) =>
    outliers > 0 ? outlierBytes(PAGE_TOKENS * outliers) : 0;
  return {
    kCodes: section(codeBytes(kSpec.bits, keyShape(headDim))),
    kScales: section(scaleBytes(kSpec)),
    kZeros: section(zeroBytes(kSpec)),
    kOutliers: section(outlierSection(kSpec)),
    vCodes: section(codeBytes(vSpec.bits, valueShape(headDim))),
    vScales: section(scaleBytes(vSpec)),
    vZeros: section(zeroBytes(vSpec)),
    vOutliers: section(outlierSection(vSpec)),
    bytes: offset,
  };
}

/** Contents by slot (tokens) or by sub-block; missing and undefined entries are unused and stay zero bits. */
export interface PageContents extends PageSpec {
  readonly kTokens: readonly (QuantisedToken | undefined)[];
  /** [slot]; for every V grouping but `tokens32` (and for 16 bits). */
  readonly vTokens?: readonly (QuantisedToken | undefined)[];
  /** [sub-block]; for V `tokens32`. */
  readonly vBlocks?: readonly (QuantisedBlock | undefined)[];
}

/** Page bytes and the compact zero points of hybrid tensors (binary16 patterns, in writing order). */
export interface BuiltPage {
  readonly bytes: Uint8Array;
  readonly kZeros: number[];
  readonly vZeros: number[];
}

export function buildPage(contents: PageContents): BuiltPage {
  const { kSpec, vSpec, headDim, kTokens, vTokens = [], vBlocks = [] } = contents;
  const at = pageOffsets(contents);
  const bytes = new Uint8Array(at.bytes);
  const view = (section: Section) => bytes.subarray(section.offset, section.offset + section.length);

  const kPlaces = { codes: view(at.kCodes), scales: view(at.kScales), zeros: view(at.kZeros) };
  const vPlaces = { codes: view(at.vCodes), scales: view(at.vScales), zeros: view(at.vZeros) };
  const kZeros = writeTokens(kPlaces, kSpec, kTokens, (slot, channel) => ({
    shape: keyShape(headDim),
    row: slot,
    element: channel,
  }));
  const valueAt = (slot: number, channel: number) => ({
    shape: valueShape(headDim),
    row: channel,
    element: slot,
  });
  const vZeros =
    vSpec.group === 'tokens32' && vSpec.bits !== 16
      ? writeBlocks(vPlaces, vSpec, vBlocks, headDim, valueAt)
      : writeTokens(vPlaces, vSpec, vTokens, valueAt);
  writeOutliers(view(at.kOutliers), kSpec, kTokens);
  writeOutliers(view(at.vOutliers), vSpec, vTokens);
  return { bytes, kZeros, vZeros };
}

function writeOutliers(
  bytes: Uint8Array,
  { outliers = 0 }: TensorSpec,
  tokens: readonly (QuantisedToken | undefined)[],
): void {
  if (outliers === 0) return;
  const rows = tokens.map((token): readonly Outlier[] | undefined => token?.outliers);
  bytes.set(encodeOutliers(rows, PAGE_TOKENS * outliers));
}

interface Places {
  codes: Uint8Array;
  scales: Uint8Array;
  zeros: Uint8Array;
}

type Address = (slot: number, channel: number) => { shape: MatrixShape; row: number; element: number };

function writeTokens(
  places: Places,
  spec: TensorSpec,
  tokens: readonly (QuantisedToken | undefined)[],
  address: Address,
): number[] {
  const compact: number[] = [];
  tokens.forEach((token, slot) => {
    if (token === undefined) return;
    token.codes.forEach((code, channel) =>
      writeCode(places.codes, spec.bits, address(slot, channel), code, slot, channel),
    );
    token.scaleBits.forEach((scale, group) => {
      writeGroup(places, spec, group * PAGE_TOKENS + slot, scale, token.zeroBits[group], compact);
    });
  });
  return compact;
}

function writeBlocks(
  places: Places,
  spec: TensorSpec,
  blocks: readonly (QuantisedBlock | undefined)[],
  headDim: number,
  address: Address,
): number[] {
  const compact: number[] = [];
  blocks.forEach((block, index) => {
    if (block === undefined) return;
    block.codes.forEach((code, i) => {
      const slot = index * SUB_BLOCK_TOKENS + Math.floor(i / headDim);
      writeCode(places.codes, spec.bits, address(slot, i % headDim), code, slot, i % headDim);
    });
    block.scaleBits.forEach((scale, channel) => {
      writeGroup(places, spec, index * headDim + channel, scale, block.zeroBits[channel], compact);
    });
  });
  return compact;
}

/** A code to its quad; 16 bits go row-major [slot][channel], for K and V alike. */
function writeCode(
  bytes: Uint8Array,
  bits: Bits,
  { shape, row, element }: ReturnType<Address>,
  code: number,
  slot: number,
  channel: number,
): void {
  const headDim = (shape.rows * shape.elements) / PAGE_TOKENS;
  if (bits === 16) putHalf(bytes, slot * headDim + channel, code);
  else putCode(bytes, bits, shape, row, element, code);
}

function writeGroup(
  places: Places,
  spec: TensorSpec,
  index: number,
  scaleBits: number,
  zeroBits: number | undefined,
  compact: number[],
): void {
  putHalf(places.scales, index, scaleBits);
  if (spec.mode === 'asymmetric') putHalf(places.zeros, index, zeroBits!);
  else if (isHybrid(spec.mode) && zeroBits !== undefined) compact.push(zeroBits);
}
