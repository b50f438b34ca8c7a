/**
 * Text to tokens and back. Encoding is the work of @huggingface/tokenizers, which every source of a vocabulary is
 * brought to (tokenizer.json form); decoding is ours, on bytes, so that a token may end in the middle of a character.
 */
import { KvError, invalid } from '../errors';
import { isJson, type Json } from './hugging-face';
import { hubTokenizer, type HubTokenizer } from './packages';
import { corrupt, quoted, unsupported } from './tensors';

export interface EncodeOptions {
  /** Whether the beginning-of-sequence token comes first; default: as the model was trained. */
  readonly bos?: boolean;
  /** Whether control tokens written out in the text, such as `<|im_end|>`, become those tokens; default false. */
  readonly special?: boolean;
}

export interface DecodeOptions {
  /** Whether control tokens are written out; default false: they are left out. */
  readonly special?: boolean;
  /** The tokens follow others: the space that SentencePiece puts before a text is kept. Default false. */
  readonly continues?: boolean;
}

/** Turns tokens into text as they come. */
export interface TokenStream {
  /** The text that this token completes; '' while a character is still open. */
  push(id: number): string;
  /** What is left: U+FFFD if the last character was never completed. */
  end(): string;
}

export interface Tokenizer {
  /** `byte-level BPE` or `SentencePiece BPE`. */
  readonly kind: TokenizerKind;
  /** Ids are 0 … size - 1. */
  readonly size: number;
  readonly bos: number | undefined;
  /** Whether `encode` puts BOS first by default. */
  readonly addsBos: boolean;
  /** Ids of `text`; lone surrogates become U+FFFD. */
  encode(text: string, options?: EncodeOptions): Int32Array;
  /** Text of `ids`; bytes that are no UTF-8 become U+FFFD. */
  decode(ids: ArrayLike<number>, options?: DecodeOptions): string;
  stream(options?: DecodeOptions): TokenStream;
  /** UTF-8 of one token, as `decode` would join it; empty for control tokens and for ids without a token. */
  bytes(id: number): Uint8Array;
  /** The token as its vocabulary writes it. */
  token(id: number): string | undefined;
}

export type TokenizerKind = 'byte-level BPE' | 'SentencePiece BPE';

/** A tokenizer in tokenizer.json form. */
export interface TokenizerSource {
  /** Names the file in messages. */
  readonly path: string;
  readonly json: Json;
  readonly bos?: number | undefined;
  readonly addsBos: boolean;
  /** Tokens that `json` cannot hold, by id: second tokens of the same name, tokens out of use. */
  readonly others?: ReadonlyMap<number, string>;
}

/** Ids beyond this are not believed. */
export const MAX_TOKENS = 1 << 20;
/** Characters of all added tokens: the package spends an object on each. */
const MAX_ADDED = 1 << 20;
/** A token that no vocabulary has: the package drops characters that it cannot write, unless it has a name for them. */
const MISSING = '\0missing';

export function makeTokenizer(source: TokenizerSource): Tokenizer {
  return new JsonTokenizer(source);
}

interface Piece {
  readonly token: string;
  readonly bytes: Uint8Array;
  readonly special: boolean;
}

class JsonTokenizer implements Tokenizer {
  readonly kind: TokenizerKind;
  readonly size: number;
  readonly bos: number | undefined;
  readonly addsBos: boolean;
  private readonly pieces: readonly (Piece | undefined)[];
  private readonly leadingSpace: boolean;
  private readonly encoders: { plain?: HubTokenizer; special?: HubTokenizer } = {};

  constructor(private readonly source: TokenizerSource) {
    const { json, path, bos } = source;
    const form = decoderForm(json.decoder, path);
    this.kind = form.kind;
    this.leadingSpace = form.leadingSpace;
    this.pieces = readPieces(source, form.kind);
    this.size = this.pieces.length;
    if (bos !== undefined && !this.pieces[bos])
      throw corrupt(path, `its BOS ${bos} is not in the vocabulary`);
    this.bos = bos;
    this.addsBos = source.addsBos && bos !== undefined;
  }

  encode(text: string, { bos = this.addsBos, special = false }: EncodeOptions = {}): Int32Array {
    if (typeof text !== 'string') throw invalid('The text to encode must be a string.');
    if (bos && this.bos === undefined)
      throw invalid('This vocabulary has no token for the beginning of a text.');
    const ids = this.encoded(text.replace(/\p{Surrogate}/gu, '\ufffd'), special);
    const out = new Int32Array(ids.length + (bos ? 1 : 0));
    if (bos) out[0] = this.bos!;
    ids.forEach((id, i) => {
      if (id === undefined)
        throw new KvError(
          'ERR_INNERKV_UNSUPPORTED',
          `${this.source.path}: the vocabulary cannot write this text.`,
        );
      out[i + (bos ? 1 : 0)] = id;
    });
    return out;
  }

  decode(ids: ArrayLike<number>, options: DecodeOptions = {}): string {
    const stream = this.stream(options);
    let text = '';
    for (let i = 0; i < ids.length; i++) text += stream.push(ids[i]!);
    return text + stream.end();
  }

  stream({ special = false, continues = false }: DecodeOptions = {}): TokenStream {
    const decoder = new TextDecoder('utf-8', { ignoreBOM: true });
    let strip = this.leadingSpace && !continues;
    return {
      push: (id) => {
        const piece = this.piece(id);
        if (!piece || (piece.special && !special)) return '';
        const from = strip && piece.bytes[0] === 0x20 ? 1 : 0;
        strip = false;
        return decoder.decode(piece.bytes.subarray(from), { stream: true });
      },
      end: () => decoder.decode(),
    };
  }

  bytes(id: number): Uint8Array {
    const piece = this.piece(id);
    return piece && !piece.special ? piece.bytes.slice() : new Uint8Array(0);
  }

  token(id: number): string | undefined {
    return this.piece(id)?.token;
  }

  private piece(id: number): Piece | undefined {
    if (!Number.isInteger(id) || id < 0 || id >= this.size)
      throw invalid(`Token ${id} is not one of the ${this.size} of this vocabulary.`);
    return this.pieces[id];
  }

  private encoded(text: string, special: boolean): readonly (number | undefined)[] {
    if (text === '') return [];
    const which = special ? 'special' : 'plain';
    try {
      const encoder = (this.encoders[which] ??= hubTokenizer(encoderJson(this.source, special)));
      return encoder.encode(text, { add_special_tokens: false }).ids;
    } catch (cause) {
      const reason = cause instanceof Error ? cause.message : String(cause);
      throw corrupt(this.source.path, `its tokenizer does not work (${reason})`, cause);
    }
  }
}

/** What the package gets: nothing that adds tokens, no silent loss, and control tokens only if they may be found. */
function encoderJson({ json, path }: TokenizerSource, special: boolean): Json {
  const model = modelOf(json, path);
  const added = addedTokens(json, path);
  // A control token must not come out of a text by any merge or match either.
  const hidden = new Set(special ? [] : added.filter((token) => token.special).map(({ content }) => content));
  const vocab = Object.entries(model.vocab).filter(
    ([token]) => !hidden.has(token) || token === model.unk_token,
  );
  return {
    normalizer: null,
    pre_tokenizer: null,
    ...json,
    model: { ...model, vocab: Object.fromEntries(vocab), unk_token: model.unk_token ?? MISSING },
    added_tokens: added.filter((token) => special || !token.special),
    post_processor: null,
    decoder: null,
  };
}

function modelOf(json: Json, path: string): Json & { readonly vocab: Json } {
  const { model } = json;
  if (!isJson(model)) throw corrupt(path, 'its tokenizer has no model');
  const { type, vocab, merges } = model;
  if (type !== 'BPE' && !(type === undefined && Array.isArray(merges)))
    throw unsupported(path, `its tokenizer is ${quoted(type)}; BPE is known`);
  if (!isJson(vocab)) throw corrupt(path, 'its vocabulary is no object');
  const size = Object.keys(vocab).length;
  if (size > MAX_TOKENS) throw corrupt(path, `its vocabulary has ${size} tokens`);
  const pair = (item: unknown) =>
    typeof item === 'string' ||
    (Array.isArray(item) && item.length === 2 && item.every((part) => typeof part === 'string'));
  if (!Array.isArray(merges) || !merges.every(pair)) throw corrupt(path, 'its merges are no pairs of tokens');
  return { ...model, vocab };
}

interface AddedToken {
  readonly id: number;
  readonly content: string;
  readonly special: boolean;
}

function addedTokens(json: Json, path: string): readonly AddedToken[] {
  const added = json.added_tokens ?? [];
  const valid = (token: unknown): token is AddedToken =>
    isJson(token) &&
    typeof token.content === 'string' &&
    token.content !== '' &&
    typeof token.special === 'boolean';
  if (!Array.isArray(added) || !added.every(valid)) throw corrupt(path, 'its added tokens are not described');
  if (added.reduce((sum, { content }) => sum + content.length, 0) > MAX_ADDED)
    throw corrupt(path, 'its added tokens are too many or too long');
  return added;
}

interface DecoderForm {
  readonly kind: TokenizerKind;
  /** Texts are encoded with a space before them, which decoding takes away. */
  readonly leadingSpace: boolean;
}

/** The two decoders that language models use; any other one is refused rather than approximated. */
function decoderForm(decoder: unknown, path: string): DecoderForm {
  const steps = isJson(decoder) && decoder.type === 'Sequence' ? decoder.decoders : [decoder];
  const types = Array.isArray(steps) ? steps.map((step) => (isJson(step) ? step.type : undefined)) : [];
  if (types.includes('ByteLevel') && types.every((type) => type === 'ByteLevel' || type === 'Fuse'))
    return { kind: 'byte-level BPE', leadingSpace: false };
  const known = ['Replace', 'ByteFallback', 'Fuse', 'Strip', 'Metaspace'];
  const spaces = types.includes('Replace') || types.includes('Metaspace');
  if (spaces && types.every((type) => known.includes(type as string))) {
    const metaspace = (steps as Json[]).find(({ type }) => type === 'Metaspace');
    const prefixed = metaspace?.prepend_scheme !== 'never' && metaspace?.add_prefix_space !== false;
    return { kind: 'SentencePiece BPE', leadingSpace: metaspace ? prefixed : types.includes('Strip') };
  }
  throw unsupported(path, `its decoder is ${quoted(types.join(', '))}; ByteLevel and Metaspace are known`);
}

function readPieces(source: TokenizerSource, kind: TokenizerKind): (Piece | undefined)[] {
  const { json, path, others = new Map<number, string>() } = source;
  const pieces: (Piece | undefined)[] = [];
  const put = (id: unknown, token: string, bytes: Uint8Array, special: boolean) => {
    if (!Number.isInteger(id) || (id as number) < 0 || (id as number) >= MAX_TOKENS)
      throw corrupt(path, `its token ${quoted(token)} has the id ${String(id)}`);
    pieces[id as number] = { token, bytes, special };
  };
  const bytesOf = kind === 'byte-level BPE' ? byteLevelBytes : sentencePieceBytes;
  for (const [id, token] of others) put(id, token, bytesOf(token), false);
  for (const [token, id] of Object.entries(modelOf(json, path).vocab)) put(id, token, bytesOf(token), false);
  for (const { id, content, special } of addedTokens(json, path)) put(id, content, utf8(content), special);
  // Holes read as undefined either way; a dense array is what the engine is quick with.
  return Array.from(pieces);
}

const encoder = new TextEncoder();
const utf8 = (text: string) => encoder.encode(text);

/** Byte-level vocabularies write each byte as a character: itself if it can be seen, else one from U+0100 up. */
export const byteCharacters: readonly string[] = (() => {
  const seen = (byte: number) =>
    (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte <= 0xff && byte !== 0xad);
  let next = 0x100;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(seen(byte) ? byte : next++));
})();
const byteOfCharacter = new Map(byteCharacters.map((character, byte) => [character, byte]));

function byteLevelBytes(token: string): Uint8Array {
  const bytes = new Uint8Array(token.length);
  for (let i = 0; i < token.length; i++) {
    const byte = byteOfCharacter.get(token[i]!);
    if (byte === undefined) return utf8(token); // not made of bytes: it stands for itself
    bytes[i] = byte;
  }
  return bytes;
}

function sentencePieceBytes(token: string): Uint8Array {
  const byte = /^<0x([0-9A-F]{2})>$/.exec(token)?.[1];
  return byte === undefined ? utf8(token.replaceAll('\u2581', ' ')) : Uint8Array.of(parseInt(byte, 16));
}
