/** Vocabularies of GGUF and llama2.c files, brought into tokenizer.json form. */
import { type Cursor } from './bytes';
import { type Gguf } from './gguf';
import { type Json } from './hugging-face';
import { corrupt, quoted, unsupported } from './tensors';
import { MAX_TOKENS, makeTokenizer, type Tokenizer, type TokenizerSource } from './tokenizer';

/** Types of tokens, by the numbers of GGUF. */
const NORMAL = 1;
const UNKNOWN = 2;
const CONTROL = 3;
const USER_DEFINED = 4;
const BYTE = 6;

/**
 * How byte-level vocabularies cut a text before they merge, by the name that GGUF files give: expressions that cut in
 * turn, and whether a piece that is a token as a whole is taken without merging. Expressions and facts are those of the
 * models' own tokenizer.json files.
 */
interface Cutting {
  readonly names: readonly string[];
  readonly cuts: readonly string[];
  readonly ignoreMerges?: boolean;
  readonly addsBos?: boolean;
  readonly normalizer?: string;
}

const GPT2 = String.raw`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`;
/** Since GPT-4: contractions in either case, digits in runs of at most `digits`, line ends with what precedes them. */
const gpt4 = (digits: string) =>
  String.raw`(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}${digits}` +
  String.raw`| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`;
const UPPER = String.raw`[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]`;
const LOWER = String.raw`[\p{Ll}\p{Lm}\p{Lo}\p{M}]`;
const TEKKEN =
  String.raw`[^\r\n\p{L}\p{N}]?${UPPER}*${LOWER}+|[^\r\n\p{L}\p{N}]?${UPPER}+${LOWER}*|\p{N}` +
  String.raw`| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+`;

const cuttings: readonly Cutting[] = [
  { names: ['default', 'gpt-2'], cuts: [GPT2] },
  { names: ['smollm', 'starcoder', 'refact', 'codeshell'], cuts: [String.raw`\p{N}`, GPT2] },
  { names: ['llama-bpe', 'llama3', 'llama-v3'], cuts: [gpt4('{1,3}')], ignoreMerges: true, addsBos: true },
  { names: ['qwen2', 'deepseek-r1-qwen'], cuts: [gpt4('')], normalizer: 'NFC' },
  { names: ['tekken'], cuts: [TEKKEN], ignoreMerges: true, addsBos: true },
  {
    names: ['deepseek-coder'],
    cuts: ['[\\r\\n]', '\\s?\\p{L}+', '\\s?\\p{P}+', '[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+', '\\p{N}'],
  },
];

export const preTokenizers = cuttings.flatMap(({ names }) => names);

interface Vocabulary {
  readonly path: string;
  readonly tokens: readonly string[];
  readonly types: readonly number[];
}

export function ggufTokenizer(gguf: Gguf): Tokenizer {
  const { path, metadata } = gguf;
  const model = metadata.get('tokenizer.ggml.model');
  if (model === undefined) throw unsupported(path, 'it brings no tokenizer');
  const tokens = list(gguf, 'tokens', 'string');
  if (!tokens) throw corrupt(path, 'its tokenizer has no tokens');
  const types =
    list(gguf, 'token_type', 'number', tokens.length) ?? new Array<number>(tokens.length).fill(NORMAL);
  const vocabulary = { path, tokens, types };
  const given = metadata.get('tokenizer.ggml.bos_token_id');
  const bos = typeof given === 'number' ? given : undefined;
  const flag = (name: string, usual: boolean) => {
    const value = metadata.get(`tokenizer.ggml.${name}`) ?? usual;
    if (typeof value !== 'boolean') throw corrupt(path, `tokenizer.ggml.${name} is no truth value`);
    return value;
  };
  if (model === 'llama') {
    const scores = list(gguf, 'scores', 'number', tokens.length);
    if (!scores) throw corrupt(path, 'its tokenizer has no scores');
    return sentencePiece(
      { ...vocabulary, scores },
      bos,
      flag('add_bos_token', true),
      flag('add_space_prefix', true),
    );
  }
  if (model !== 'gpt2')
    throw unsupported(path, `its tokenizer is ${quoted(model)}; gpt2 and llama are known`);
  const name = metadata.get('tokenizer.ggml.pre') ?? 'default';
  const cutting = cuttings.find(({ names }) => names.includes(name as string));
  if (!cutting)
    throw unsupported(path, `its pre-tokenizer is ${quoted(name)}; known are ${preTokenizers.join(', ')}`);
  const merges = list(gguf, 'merges', 'string');
  if (!merges) throw corrupt(path, 'its tokenizer has no merges');
  return byteLevel(vocabulary, merges, cutting, bos, flag('add_bos_token', cutting.addsBos ?? false));
}

interface Item {
  readonly string: string;
  readonly number: number;
}

/** An array of the tokenizer's metadata; undefined where there is none. */
function list<Name extends keyof Item>(
  { path, metadata }: Gguf,
  name: string,
  type: Name,
  length?: number,
): readonly Item[Name][] | undefined {
  const value = metadata.get(`tokenizer.ggml.${name}`);
  if (value === undefined) return undefined;
  const items: readonly unknown[] | undefined = Array.isArray(value) ? value : undefined;
  if (!items?.every((item): item is Item[Name] => typeof item === type))
    throw corrupt(path, `tokenizer.ggml.${name} is no list of ${type}s`);
  if (length !== undefined && items.length !== length)
    throw corrupt(path, `tokenizer.ggml.${name} has ${items.length} entries for ${length} tokens`);
  return items;
}

function byteLevel(
  vocabulary: Vocabulary,
  merges: readonly string[],
  cutting: Cutting,
  bos: number | undefined,
  addsBos: boolean,
): Tokenizer {
  const { path } = vocabulary;
  const sorted = sortTokens(vocabulary, (type) => type === NORMAL || type === BYTE);
  const pairs = merges.map((merge): [string, string] => {
    const space = merge.indexOf(' ', 1);
    const [left, right] = [merge.slice(0, space), merge.slice(space + 1)];
    if (space < 1 || right === '' || !sorted.ids.has(left + right))
      throw corrupt(path, `its merge ${quoted(merge)} makes no token`);
    return [left, right];
  });
  const split = (expression: string) => ({
    type: 'Split',
    pattern: { Regex: expression },
    behavior: 'Isolated',
    invert: false,
  });
  const bytes = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: false };
  return makeTokenizer({
    path,
    bos,
    addsBos,
    others: sorted.others,
    json: {
      added_tokens: sorted.added,
      normalizer: cutting.normalizer === undefined ? null : { type: cutting.normalizer },
      pre_tokenizer: { type: 'Sequence', pretokenizers: [...cutting.cuts.map(split), bytes] },
      decoder: { type: 'ByteLevel' },
      model: {
        type: 'BPE',
        vocab: Object.fromEntries(sorted.ids),
        merges: pairs,
        ignore_merges: cutting.ignoreMerges ?? false,
      },
    },
  });
}

/** SentencePiece's marker of a space. */
const SPACE = '\u2581';
/** Bounds the search for merges: the squared lengths of all pieces. Those of the largest vocabularies come to 2^25. */
const MAX_WORK = 2 ** 28;

/**
 * A SentencePiece vocabulary merges, of all neighbours that make a piece, those whose piece has the highest score, the
 * leftmost first. A list of merges in the order of scores does the same.
 */
function sentencePiece(
  vocabulary: Vocabulary & { readonly scores: readonly number[] },
  bos: number | undefined,
  addsBos: boolean,
  spacePrefix: boolean,
): Tokenizer {
  const { path, tokens, types, scores } = vocabulary;
  if (!scores.every(Number.isFinite)) throw corrupt(path, 'its scores are not all finite');
  const sorted = sortTokens(vocabulary, (type) => type === NORMAL || type === BYTE);
  const merged = [...sorted.ids].filter(([, id]) => types[id] === NORMAL);
  if (merged.reduce((sum, [token]) => sum + token.length ** 2, 0) > MAX_WORK)
    throw corrupt(path, 'its pieces are too long');
  const mergeable = new Set(merged.map(([token]) => token));
  const merges = merged
    .sort(([, a], [, b]) => scores[b]! - scores[a]! || a - b)
    .flatMap(([token]) => {
      const characters = Array.from(token);
      let left = '';
      return characters.slice(1).flatMap((_, i): [string, string][] => {
        left += characters[i]!;
        const right = token.slice(left.length);
        return mergeable.has(left) && mergeable.has(right) ? [[left, right]] : [];
      });
    });
  // Where no piece has a space behind another character, texts fall apart before every run of spaces.
  const apart = !merged.some(([token]) => /[^\u2581]\u2581/.test(token));
  const unknown = types.indexOf(UNKNOWN);
  const replace = (from: string, content: string) => ({
    type: 'Replace',
    pattern: { String: from },
    content,
  });
  return makeTokenizer({
    path,
    bos,
    addsBos,
    others: sorted.others,
    json: {
      added_tokens: sorted.added,
      normalizer: {
        type: 'Sequence',
        normalizers: [...(spacePrefix ? [{ type: 'Prepend', prepend: SPACE }] : []), replace(' ', SPACE)],
      },
      pre_tokenizer: apart
        ? {
            type: 'Split',
            pattern: { Regex: '\u2581+[^\u2581]*|[^\u2581]+' },
            behavior: 'Isolated',
            invert: false,
          }
        : null,
      decoder: {
        type: 'Sequence',
        decoders: [
          replace(SPACE, ' '),
          { type: 'ByteFallback' },
          { type: 'Fuse' },
          ...(spacePrefix ? [{ type: 'Strip', content: ' ', start: 1, stop: 0 }] : []),
        ],
      },
      model: {
        type: 'BPE',
        vocab: Object.fromEntries(sorted.ids),
        merges,
        byte_fallback: true,
        ...(unknown >= 0 && { unk_token: tokens[unknown] }),
      },
    },
  });
}

/** Tokens by what tokenizer.json does with them. Of several tokens of one name the last is the one that texts get. */
function sortTokens({ path, tokens, types }: Vocabulary, mergeable: (type: number) => boolean) {
  if (tokens.length === 0 || tokens.length > MAX_TOKENS)
    throw corrupt(path, `its vocabulary has ${tokens.length} tokens`);
  const ids = new Map<string, number>();
  const others = new Map<number, string>();
  const added: Json[] = [];
  tokens.forEach((content, id) => {
    const type = types[id]!;
    if (type === UNKNOWN || type === CONTROL || type === USER_DEFINED) {
      if (content === '') others.set(id, content);
      else added.push({ id, content, special: type !== USER_DEFINED, normalized: false });
      return;
    }
    const before = ids.get(content);
    if (before !== undefined) others.set(before, content);
    if (mergeable(type)) ids.set(content, id);
    else others.set(id, content);
  });
  return { ids, others, added };
}

/**
 * The vocabulary beside a llama2.c checkpoint: int32 length of the longest piece, then per token its float32 score,
 * int32 length and bytes. Ids 0, 1, 2 are unknown, BOS and EOS; 3 … 258 are bytes.
 */
export function llama2cTokenizer(path: string, size: number, cursor: Cursor): Tokenizer {
  cursor.i32(); // the longest piece
  const tokens: string[] = [];
  const scores: number[] = [];
  for (let id = 0; id < size; id++) {
    scores.push(cursor.f32());
    const length = cursor.i32();
    if (length < 0) throw corrupt(path, `its token ${id} has ${length} bytes`);
    tokens.push(cursor.text(length));
  }
  if (cursor.left !== 0) throw corrupt(path, `it has ${cursor.left} bytes more than ${size} tokens`);
  const special = [UNKNOWN, CONTROL, CONTROL];
  const types = tokens.map((token, id) => special[id] ?? (/^<0x[0-9A-F]{2}>$/.test(token) ? BYTE : NORMAL));
  // Here the three control tokens are written with line ends around their names.
  const trimmed = tokens.map((token, id) => (id < 3 ? token.trim() : token.replaceAll(' ', SPACE)));
  return sentencePiece({ path, tokens: trimmed, types, scores }, 1, true, true);
}

/** A folder's tokenizer.json and tokenizer_config.json. */
export function hubSource(path: string, json: Json, config: Json): TokenizerSource {
  const name = typeof config.bos_token === 'string' ? config.bos_token : nested(config.bos_token, 'content');
  const added = Array.isArray(json.added_tokens) ? (json.added_tokens as unknown[]) : [];
  const bos = added.map((token) => (nested(token, 'content') === name ? nested(token, 'id') : undefined));
  const id = name === undefined ? undefined : bos.find((one) => typeof one === 'number');
  const addsBos =
    typeof config.add_bos_token === 'boolean' ? config.add_bos_token : beginsWith(json.post_processor, name);
  return { path, json, bos: id, addsBos };
}

function nested(value: unknown, key: string): unknown {
  return typeof value === 'object' && value !== null ? (value as Json)[key] : undefined;
}

/** Whether a post-processor's template puts the token `name` before a text. */
function beginsWith(processor: unknown, name: unknown): boolean {
  const steps = nested(processor, 'processors');
  if (Array.isArray(steps)) return steps.some((step) => beginsWith(step, name));
  const template = nested(processor, 'single');
  const first: unknown = Array.isArray(template) ? template[0] : undefined;
  return name !== undefined && nested(nested(first, 'SpecialToken'), 'id') === name;
}
