/** The beginning of a text as tokens, without tokenising all of it. */
import { readFileSync } from 'node:fs';
import { KvError } from '../errors';
import { type Tokenizer } from '../model/tokenizer';

/** Tokens at a cut end of a text may be others than those of the whole text. */
const DOUBTFUL = 64;

/** The first `count` tokens of the whole text, or all of them when it has fewer. BOS as given to `encode`. */
export function leadingTokens(
  tokenizer: Tokenizer,
  text: string,
  count: number,
  options: { readonly bos?: boolean } = {},
): Int32Array {
  for (let characters = 8 * (count + DOUBTFUL); characters < text.length; characters *= 2) {
    const tokens = tokenizer.encode(text.slice(0, characters), options);
    if (tokens.length >= count + DOUBTFUL) return tokens.slice(0, count);
  }
  return tokenizer.encode(text, options).slice(0, count);
}

export function readText(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new KvError('ERR_INNERKV_INVALID_ARGUMENT', `Cannot read ${path}: ${reason}.`, { cause });
  }
}
