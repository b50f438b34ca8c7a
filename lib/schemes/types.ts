/**
 * What a scheme is, as plain data: the border between the schemes, which decide, and the cache, which obeys.
 * Meaning of every field: docs/format.md.
 */

/** Bits of one stored number; 16 means binary16 values without codes and scales. */
export type Bits = 1 | 2 | 3 | 4 | 8 | 16;
/** Which numbers share a scale: runs of channels of one token, a whole token, or 32 tokens of one channel. */
export type GroupName = 'channels32' | 'channels64' | 'token' | 'tokens32';
/** How codes become values. */
export type ModeName = 'midRise' | 'zeroLevel' | 'signedMax' | 'asymmetric' | 'hybrid' | 'hybridReleased';

/** Storage of one tensor (K or V). 16 bits go with group `token` and mode `midRise`. */
export interface TensorSpec {
  readonly bits: Bits;
  readonly group: GroupName;
  readonly mode: ModeName;
  /**
   * Largest numbers of each token that are kept apart, sparse, 0 (default) to 8: about 24 bits each. Any format of fewer
   * than 16 bits may have them but `tokens32`; keys that are rounded with error feedback may not. docs/format.md section 8.
   */
  readonly outliers?: number;
}

/** Change of basis of one KV head's keys. Absent parts are steps left out; D = headDim. */
export interface HeadBasis {
  /** Subtracted from keys, [D]. */
  readonly mean?: Float32Array;
  /** Keys are divided by it, [D], positive. */
  readonly lam?: Float32Array;
  /**
   * Channel that is rounded as the i-th, [D], a permutation. `metric`, `feedback` and `pivot` are in this order; the
   * four go together.
   */
  readonly order?: Uint8Array;
  /** Metric W of the rounding error, [D, D] row-major, symmetric. */
  readonly metric?: Float32Array;
  /** Error feedback F, [D, D] row-major, strictly upper. */
  readonly feedback?: Float32Array;
  /** d = 1 / diag U, [D]. */
  readonly pivot?: Float32Array;
}

/** Everything the core needs to know about one layer. */
export interface LayerScheme {
  readonly k: TensorSpec;
  readonly v: TensorSpec;
  /** First tokens that stay in 16 bits. */
  readonly sink: number;
  /** Newest tokens that stay in 16 bits, at least. */
  readonly recent: number;
  /** Tokens per rotation block of block-relative keys, a multiple of 128; 0 = keys keep their absolute rotation. */
  readonly blockTokens: number;
  readonly hadamardK: boolean;
  readonly hadamardV: boolean;
  /** Mean and normalisation from the sequence's own first `statTokens` tokens. */
  readonly onlineMean: boolean;
  readonly onlineLambda: boolean;
  readonly statTokens: number;
  /** Scales are corrected so that rounding does not shrink keys (values). */
  readonly unbiasedK: boolean;
  readonly unbiasedV: boolean;
  /** Clip ratios to try, at most 8; empty = no search. */
  readonly clipK: readonly number[];
  readonly clipV: readonly number[];
  /** Window trajectory of InnerQ's released code, for comparison only. */
  readonly releasedWindows: boolean;
  /** One basis per KV head, or null. */
  readonly basis: readonly HeadBasis[] | null;
}

/** Context extension of rotary embeddings. */
export type RopeScaling =
  | { readonly type: 'linear'; readonly factor: number }
  | {
      readonly type: 'llama3';
      readonly factor: number;
      readonly lowFreqFactor: number;
      readonly highFreqFactor: number;
      readonly originalContext: number;
    };

/** Rotary embedding of the model. */
export interface RopeOptions {
  /** Base of the geometric series of frequencies, e.g. 10000 or 500000. */
  readonly base: number;
  /** Pairs are channels (i, i + rotaryDims / 2) for `half`, (2i, 2i + 1) for `adjacent`. */
  readonly layout: 'half' | 'adjacent';
  /** Channels that rotate; default headDim. */
  readonly rotaryDims?: number;
  readonly scaling?: RopeScaling;
  /** Radians per position of each pair, [rotaryDims / 2], instead of base and scaling. */
  readonly theta?: Float64Array;
}

/** The part of a model's geometry that a cache needs. */
export interface CacheShape {
  readonly layers: number;
  readonly queryHeads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly rope?: RopeOptions;
  /** Lets schemes refuse what was made for another model. */
  readonly model?: ModelIdentity;
}

export interface ModelIdentity {
  readonly name: string;
  /** ModelFile.fingerprint. */
  readonly fingerprint: string;
}

/** Tokens kept in 16 bits at both ends of a sequence. */
export interface Windows {
  readonly sink: number;
  readonly recent: number;
}

/** Decides how each layer is stored. `layer` is pure; it throws KvError for a shape it cannot serve. */
export interface Scheme {
  readonly name: string;
  layer(layer: number, shape: CacheShape, windows: Windows): LayerScheme;
}
