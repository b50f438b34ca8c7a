/**
 * A naive model of one KV head's cache: a list of tokens, each with binary16 or quantised K and V. No pages, no slots.
 * Source: docs/format.md section 5 (statistics), 6; window rule: recent windows never shrink below `recent` and flush
 * f tokens when they hold recent + f (f = 32 for V `tokens32`, else 1). K and V flush independently.
 */
import { quantiseKeyFeedback, type FeedbackMatrices } from './feedback';
import { fromHalfBits, toHalfBits, toHalfBitsIeee } from './half';
import { decodeBlockSlot, decodeToken, quantiseBlock, quantiseToken } from './quantise';
import { type QuantisedBlock, type QuantisedToken, type RoundingOptions } from './quantise';
import { hadamard32, hadamard64, restoreKey64, sequenceLam32, sequenceMean32 } from './transform';
import { transformKey32, type KeySteps, type Rope } from './transform';
import { PAGE_TOKENS, SUB_BLOCK_TOKENS, type TensorSpec } from './types';

/** Everything that decides what one head stores. Absent parts are steps left out. */
export interface HeadScheme {
  readonly headDim: number;
  readonly key: TensorSpec;
  readonly value: TensorSpec;
  /** Positions below `sink` stay in 16 bits; `recent` newest tokens at least do too. */
  readonly sink: number;
  readonly recent: number;
  /** Block-relative rotation: B tokens per block. */
  readonly rotation?: { readonly blockTokens: number; readonly rope: Rope };
  /** Subtracted from keys: given, or measured on the first statTokens tokens. */
  readonly mean?: Float32Array | 'sequence';
  /** Divides keys: given, or measured on the first statTokens tokens. */
  readonly lam?: Float32Array | 'sequence';
  /** Nothing is quantised before the sequence holds this many tokens. */
  readonly statTokens?: number;
  readonly keyHadamard?: boolean;
  readonly valueHadamard?: boolean;
  /** Keys are rounded with error feedback. */
  readonly feedback?: FeedbackMatrices;
  readonly keyRounding?: RoundingOptions;
  readonly valueRounding?: RoundingOptions;
}

/** Where one tensor of a token lives: binary16 patterns [headDim], own codes, or a slot of a block. */
export type Stored =
  | { readonly kind: 'window'; readonly bits: Uint16Array }
  | { readonly kind: 'token'; readonly token: QuantisedToken }
  | { readonly kind: 'block'; readonly block: QuantisedBlock; readonly slot: number };

export interface CachedToken {
  readonly position: number;
  readonly key: Stored;
  readonly value: Stored;
}

/** Statistics taken from the sequence itself. */
export interface SequenceStatistics {
  readonly mu: Float32Array;
  readonly lam: Float32Array;
}

export class ReferenceHead {
  /** Live tokens, ascending by position. */
  tokens: CachedToken[] = [];
  /** Position of the next token. */
  length = 0;
  statistics: SequenceStatistics | undefined;

  constructor(readonly scheme: HeadScheme) {}

  /** Appends one token, k and v [headDim] as the model made them (k after RoPE at its position). */
  append(k: Float32Array, v: Float32Array): void {
    const key = this.window(k);
    const value = this.window(v);
    this.tokens.push({ position: this.length, key, value });
    this.length++;
    this.flush();
  }

  /** Keeps the positions below `length`. */
  truncate(length: number): void {
    if (length > this.length) throw new Error(`cannot truncate ${this.length} tokens to ${length}`);
    const cut = new Set<QuantisedBlock>();
    for (const { position, value } of this.tokens)
      if (position >= length && value.kind === 'block') cut.add(value.block);
    this.tokens = this.tokens
      .filter(({ position }) => position < length)
      .map((token) =>
        token.value.kind === 'block' && cut.has(token.value.block) ? this.returned(token) : token,
      );
    this.length = length;
    if (length <= this.scheme.sink) this.statistics = undefined; // no quantised position is left, removed ones included
  }

  /** Overwrites one token where it lives; quantised tokens are quantised anew with the statistics in force. */
  replace(position: number, k: Float32Array, v: Float32Array): void {
    const index = this.indexOf(position);
    const token = this.tokens[index]!;
    if (token.value.kind === 'block') throw new Error(`position ${position} shares its value scales`);
    const key = this.window(k);
    const value = this.window(v);
    this.tokens[index] = {
      position,
      key: token.key.kind === 'window' ? key : this.quantisedKey(position, key.bits),
      value: token.value.kind === 'window' ? value : this.quantisedValue(value.bits),
    };
  }

  /** Forgets one token; schemes in which tokens share scales cannot. */
  remove(position: number): void {
    if (this.valueFlush() !== 1) throw new Error('tokens share value scales');
    this.tokens.splice(this.indexOf(position), 1);
  }

  fork(): ReferenceHead {
    const twin = new ReferenceHead(this.scheme);
    twin.tokens = [...this.tokens]; // tokens are never changed, only replaced
    twin.length = this.length;
    twin.statistics = this.statistics;
    return twin;
  }

  /** Token index: position minus the sink tokens. */
  tokenIndex(position: number): number {
    return position - this.scheme.sink;
  }

  /** First position of the rotation block of a quantised token; undefined without block-relative rotation. */
  blockPosition(position: number): number | undefined {
    const { rotation, sink } = this.scheme;
    if (!rotation) return undefined;
    return sink + rotation.blockTokens * Math.floor(this.tokenIndex(position) / rotation.blockTokens);
  }

  /** The transform in force for the key at `position`; 16-bit keys are stored as they came. */
  keySteps(position: number): KeySteps {
    if (this.scheme.key.bits === 16) return {};
    const { mean, lam, rotation, keyHadamard } = this.scheme;
    const P = this.blockPosition(position);
    return {
      rotation: rotation && P !== undefined ? { P, rope: rotation.rope } : undefined,
      mu: mean === 'sequence' ? this.statistics!.mu : mean,
      lam: lam === 'sequence' ? this.statistics!.lam : lam,
      hadamard: keyHadamard,
    };
  }

  /** Key in the space of its codes [headDim], exact float64; window keys as they are. */
  storedKey({ key }: CachedToken): Float64Array {
    return this.decode(key, this.scheme.key);
  }

  /** Value in the space of its codes [headDim], exact float64; window values as they are. */
  storedValue({ value }: CachedToken): Float64Array {
    return this.decode(value, this.scheme.value);
  }

  /** The key the query meets, back in the model's space: R(P)(H^-1(x̂)·lam + mu). */
  key(token: CachedToken): Float64Array {
    const stored = this.storedKey(token);
    return token.key.kind === 'window' ? stored : restoreKey64(stored, this.keySteps(token.position));
  }

  /** The value, back in the model's space. */
  value(token: CachedToken): Float64Array {
    const stored = this.storedValue(token);
    return token.value.kind !== 'window' && this.valuesRotate() ? hadamard64(stored) : stored;
  }

  /** Slots of page `page` (128 token indices) for buildPage; only for sequences without removals. */
  page(page: number) {
    const slots = (pick: (token: CachedToken) => Stored): (Stored | undefined)[] => {
      const row = new Array<Stored | undefined>(PAGE_TOKENS).fill(undefined);
      for (const token of this.tokens) {
        const slot = this.tokenIndex(token.position) - page * PAGE_TOKENS;
        if (slot >= 0 && slot < PAGE_TOKENS && pick(token).kind !== 'window') row[slot] = pick(token);
      }
      return row;
    };
    const own = (stored: Stored | undefined) => (stored?.kind === 'token' ? stored.token : undefined);
    const keys = slots((token) => token.key);
    const values = slots((token) => token.value);
    return {
      kSpec: this.scheme.key,
      vSpec: this.scheme.value,
      headDim: this.scheme.headDim,
      kTokens: keys.map(own),
      vTokens: values.map(own),
      vBlocks: Array.from({ length: PAGE_TOKENS / SUB_BLOCK_TOKENS }, (_, i) => {
        const first = values[i * SUB_BLOCK_TOKENS];
        return first?.kind === 'block' ? first.block : undefined;
      }),
    };
  }

  /** True if quantised values are stored in the Hadamard basis; 16-bit values never are. */
  valuesRotate(): boolean {
    return this.scheme.valueHadamard === true && this.scheme.value.bits !== 16;
  }

  private valueFlush(): number {
    const { value } = this.scheme;
    return value.group === 'tokens32' && value.bits !== 16 ? SUB_BLOCK_TOKENS : 1;
  }

  private flush(): void {
    const { statTokens = 0, recent } = this.scheme;
    if (this.length < statTokens) return; // positions, so that removals never stop the flush
    for (let waiting = this.waiting('key'); waiting.length >= recent + 1; waiting = this.waiting('key')) {
      this.takeStatistics();
      const index = waiting[0]!;
      const token = this.tokens[index]!;
      this.tokens[index] = { ...token, key: this.quantisedKey(token.position, windowBits(token.key)) };
    }
    const f = this.valueFlush();
    for (let waiting = this.waiting('value'); waiting.length >= recent + f; waiting = this.waiting('value'))
      this.flushValues(waiting.slice(0, f));
  }

  /** Indices of the tokens after the sink whose tensor is still in 16 bits. */
  private waiting(tensor: 'key' | 'value'): number[] {
    const indices: number[] = [];
    this.tokens.forEach((token, i) => {
      if (token.position >= this.scheme.sink && token[tensor].kind === 'window') indices.push(i);
    });
    return indices;
  }

  /** Statistics of the first statTokens tokens, taken when the first token is about to be quantised. */
  private takeStatistics(): void {
    const { mean, lam, key, statTokens = 0 } = this.scheme;
    if (key.bits === 16) return;
    if (this.statistics !== undefined || (mean !== 'sequence' && lam !== 'sequence')) return;
    if (statTokens < 1) throw new Error('statistics need statTokens');
    const keys = this.tokens
      .slice(0, statTokens)
      .map(({ key }) => Float32Array.from(windowBits(key), fromHalfBits));
    this.statistics = { mu: sequenceMean32(keys), lam: sequenceLam32(keys) };
  }

  private flushValues(indices: readonly number[]): void {
    const put = (index: number, value: Stored) => (this.tokens[index] = { ...this.tokens[index]!, value });
    const first = indices[0]!;
    if (this.valueFlush() === 1) {
      put(first, this.quantisedValue(windowBits(this.tokens[first]!.value)));
      return;
    }
    const values = indices.map((index) => this.transformedValue(windowBits(this.tokens[index]!.value)));
    const block = quantiseBlock(values, this.scheme.value, this.scheme.valueRounding);
    indices.forEach((index, slot) => put(index, { kind: 'block', block, slot }));
  }

  private quantisedKey(position: number, bits: Uint16Array): Stored {
    const { key, feedback, keyRounding } = this.scheme;
    const x = transformKey32(Float32Array.from(bits, fromHalfBits), this.keySteps(position));
    if (!feedback || key.bits === 16) return { kind: 'token', token: quantiseToken(x, key, keyRounding) };
    if (key.mode !== 'midRise' || key.group !== 'token')
      throw new Error('feedback is for midRise with token scales');
    const { codes, scaleBits } = quantiseKeyFeedback(x, key.bits, { ...feedback, ...keyRounding });
    return {
      kind: 'token',
      token: { codes: Uint16Array.from(codes), scaleBits: [scaleBits], zeroBits: [undefined] },
    };
  }

  private quantisedValue(bits: Uint16Array): Stored {
    const { value, valueRounding } = this.scheme;
    return { kind: 'token', token: quantiseToken(this.transformedValue(bits), value, valueRounding) };
  }

  private transformedValue(bits: Uint16Array): Float32Array {
    const x = Float32Array.from(bits, fromHalfBits);
    return this.valuesRotate() ? hadamard32(x) : x;
  }

  /** A token of a cut block: its decoded value in float32 arithmetic, rounded to binary16, back in the window. */
  private returned(token: CachedToken): CachedToken {
    const decoded = Float32Array.from(this.storedValue(token));
    const value = this.valuesRotate() ? hadamard32(decoded) : decoded;
    return { ...token, value: { kind: 'window', bits: Uint16Array.from(value, toHalfBits) } };
  }

  private decode(stored: Stored, spec: TensorSpec): Float64Array {
    if (stored.kind === 'window') return Float64Array.from(stored.bits, fromHalfBits);
    if (stored.kind === 'token') return decodeToken(stored.token, spec);
    return decodeBlockSlot(stored.block, stored.slot, spec);
  }

  private window(x: Float32Array): { kind: 'window'; bits: Uint16Array } {
    if (x.length !== this.scheme.headDim) throw new Error(`expected ${this.scheme.headDim} channels`);
    const bits = Uint16Array.from(x, toHalfBitsIeee);
    if (bits.some((pattern) => (pattern & 0x7c00) === 0x7c00)) throw new Error('not finite in binary16');
    return { kind: 'window', bits };
  }

  private indexOf(position: number): number {
    const index = this.tokens.findIndex((token) => token.position === position);
    if (index < 0) throw new Error(`no token at position ${position}`);
    return index;
  }
}

function windowBits(stored: Stored): Uint16Array {
  if (stored.kind !== 'window') throw new Error('already quantised');
  return stored.bits;
}
