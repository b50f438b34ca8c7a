/** Which tokens a perplexity is taken over: the protocols that published figures follow. docs/fidelity.md names them. */
import { invalid } from '../errors';
import { checkInteger } from '../tensor';

export const protocols = ['P1', 'P2', 'P3', 'P4'] as const;
/**
 * P1: windows side by side, all tokens but the first scored, as in papers. P2: as llama.cpp, chunks of 512 with BOS in
 * the place of their first token, second halves scored. P3: as P1, second halves scored, every token decoded through the cache. P4: long
 * windows that overlap by half, second halves scored, decoded through the cache, losses by position.
 */
export type Protocol = (typeof protocols)[number];

export interface ProtocolPlan {
  readonly protocol: Protocol;
  /** Tokens of a window, BOS included. */
  readonly window: number;
  /** Tokens from the beginning of one window to that of the next. */
  readonly stride: number;
  /** Where BOS stands: at the beginning of the text, of every window, or nowhere. */
  readonly bos: 'text' | 'window' | 'none';
  /** Position of the first token that is scored, given all before it. */
  readonly firstScored: number;
  /** Whether every query sees the cache as it was when its token was the newest (ForwardOptions.step 1). */
  readonly decoded: boolean;
}

const DEFAULTS = { P1: 2048, P2: 512, P3: 2048, P4: 8192 } as const;

/** `bos`: the token that the model's texts begin with, if any. */
export function planOf(
  protocol: Protocol,
  { window, bos }: { readonly window?: number; readonly bos?: number | undefined } = {},
): ProtocolPlan {
  // Options arrive from plain JavaScript too.
  if (!protocols.includes(protocol))
    throw invalid(`protocol must be one of ${protocols.join(', ')}, not ${JSON.stringify(protocol)}.`);
  const size = checkInteger(window ?? DEFAULTS[protocol], 2, 2 ** 24, 'tokens of a window');
  const half = size >> 1;
  return {
    protocol,
    window: size,
    stride: protocol === 'P4' ? half : size,
    bos: bos === undefined ? 'none' : protocol === 'P2' ? 'window' : 'text',
    // llama.cpp predicts from the logits of position n/2 on, which are about the token after it.
    firstScored: { P1: 1, P2: half + 1, P3: half, P4: half }[protocol],
    decoded: protocol === 'P3' || protocol === 'P4',
  };
}

/** Tokens of the text, BOS at its beginning included, that `count` windows need. */
export function tokensFor({ window, stride }: ProtocolPlan, count: number): number {
  return count < 1 ? 0 : window + (count - 1) * stride;
}

/** Full windows of a text, whose first token is BOS where the plan says so; what is left over is dropped. */
export function windowsOf(
  plan: ProtocolPlan,
  tokens: Int32Array,
  bos: number | undefined,
  most = Infinity,
): Int32Array[] {
  const windows: Int32Array[] = [];
  for (let at = 0; at + plan.window <= tokens.length && windows.length < most; at += plan.stride) {
    const window = tokens.slice(at, at + plan.window);
    if (plan.bos === 'window') window[0] = bos!;
    windows.push(window);
  }
  return windows;
}
