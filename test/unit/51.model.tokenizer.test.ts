/** Tokenizers on small vocabularies made here: encoding, decoding, streaming, and every way to refuse. */
import { memorySource, Cursor } from '../../lib/model/bytes';
import { parseGguf } from '../../lib/model/gguf';
import { makeTokenizer, type Tokenizer } from '../../lib/model/tokenizer';
import { ggufTokenizer, hubSource, llama2cTokenizer } from '../../lib/model/vocabulary';
import { mergeByScore } from '../reference/sentencepiece';
import { failure } from '../support/failures';
import { Writer, byteAlphabet, tinyTokens, tinyVocabulary, writeGguf, type Entry } from '../support/gguf';
import { Random } from '../support/random';

const corrupt = (text: string) => failure('ERR_INNERKV_CORRUPT', text);
const unsupported = (text: string) => failure('ERR_INNERKV_UNSUPPORTED', text);
const invalid = (text: string) => failure('ERR_INNERKV_INVALID_ARGUMENT', text);

const fromGguf = (metadata: readonly Entry[]) =>
  ggufTokenizer(parseGguf(memorySource(writeGguf({ metadata }))));
const tiny = (...changes: Entry[]) =>
  fromGguf([
    ...tinyVocabulary.filter(
      ([key]) => !changes.some(([changed]) => changed === `tokenizer.ggml.${key}` || changed === key),
    ),
    ...changes,
  ]);
const named = (tokenizer: Tokenizer, ids: Int32Array) => [...ids].map((id) => tokenizer.token(id));

/** Characters of one to four bytes, spaces, digits, control characters; no lone surrogates. */
function randomText(random: Random, length: number): string {
  const ranges: [number, number][] = [[0x20, 0x7f], [0x61, 0x7b], [0x20, 0x21], [0x30, 0x3a], [0, 0x20], [0xa0, 0x250], [0x4e00, 0x4e40], [0x1f300, 0x1f600], [0xfeff, 0xff00]]; // prettier-ignore
  return Array.from({ length }, () => {
    const [from, to] = random.pick(ranges);
    return String.fromCodePoint(from + random.below(to - from));
  }).join('');
}

describe('byte-level', () => {
  const tokenizer = tiny();

  test('merges words, keeps digits apart, knows its size', () => {
    expect(tokenizer).toMatchObject({
      kind: 'byte-level BPE',
      size: tinyTokens.length,
      bos: 1,
      addsBos: false,
    });
    expect(named(tokenizer, tokenizer.encode('hello world 12'))).toEqual([
      'hello',
      '\u0120world',
      '\u0120',
      '1',
      '2',
    ]);
    expect(tokenizer.encode('')).toEqual(new Int32Array(0));
  });

  test('BOS when asked, or when the file says so', () => {
    expect([...tokenizer.encode('h', { bos: true })]).toEqual([1, tokenizer.encode('h')[0]]);
    const adding = tiny(['tokenizer.ggml.add_bos_token', 'bool', true]);
    expect([...adding.encode('')]).toEqual([1]);
    expect(adding.encode('h', { bos: false })).toHaveLength(1);
    expect(tiny(['tokenizer.ggml.pre', 'string', 'llama-bpe']).addsBos).toBe(true);
    const without = tiny(
      ['tokenizer.ggml.bos_token_id', 'string', 'none'],
      ['tokenizer.ggml.add_bos_token', 'bool', true],
    );
    expect(without).toMatchObject({ bos: undefined, addsBos: false });
    expect(() => without.encode('h', { bos: true })).toThrow(invalid('no token for the beginning'));
  });

  test('control tokens in a text are text unless asked for', () => {
    const text = 'hello<|im_end|>';
    expect(tokenizer.encode(text)).not.toContain(2);
    expect(tokenizer.decode(tokenizer.encode(text))).toBe(text);
    const special = tokenizer.encode(text, { special: true });
    expect(named(tokenizer, special)).toEqual(['hello', '<|im_end|>']);
    expect(tokenizer.decode(special)).toBe('hello');
    expect(tokenizer.decode(special, { special: true })).toBe(text);
    expect(tokenizer.bytes(2)).toEqual(new Uint8Array(0));
  });

  test('any text comes back; any bytes at all decode as a decoder of UTF-8 would', () => {
    const random = new Random(5);
    for (let round = 0; round < 300; round++) {
      const text = randomText(random, random.below(40));
      expect(tokenizer.decode(tokenizer.encode(text))).toBe(text);
      const ids = Array.from({ length: random.below(12) }, () => 3 + random.below(256));
      const bytes = Uint8Array.from(ids, (id) => byteAlphabet.indexOf(tinyTokens[id]!));
      expect(tokenizer.decode(ids)).toBe(new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes));
    }
    expect(tokenizer.decode(tokenizer.encode('a\ud800b\udc00'))).toBe('a\ufffdb\ufffd');
    expect(tokenizer.decode(tokenizer.encode('__proto__ constructor'))).toBe('__proto__ constructor');
  });

  test('a stream gives whole characters, as soon as they are whole, and together the same text', () => {
    const random = new Random(6);
    for (let round = 0; round < 200; round++) {
      const text = randomText(random, random.below(30));
      const stream = tokenizer.stream();
      const parts = [...tokenizer.encode(text)].map((id) => stream.push(id));
      expect(parts.join('') + stream.end()).toBe(text);
      expect(parts.join('')).toBe(text); // nothing was held back to the end
      for (const part of parts) expect(part).not.toMatch(/\ufffd|\p{Surrogate}/u);
    }
    const llama = [...tokenizer.encode('\u{1f999}')];
    expect(llama).toHaveLength(4);
    const stream = tokenizer.stream();
    expect(llama.map((id) => stream.push(id))).toEqual(['', '', '', '\u{1f999}']);
    expect([stream.push(llama[0]!), stream.push(llama[1]!), stream.end()]).toEqual(['', '', '\ufffd']);
  });

  test('ids that are none', () => {
    for (const id of [-1, tinyTokens.length, 0.5, NaN, Infinity, '0' as unknown as number])
      for (const call of [() => tokenizer.decode([id]), () => tokenizer.token(id), () => tokenizer.bytes(id)])
        expect(call).toThrow(invalid('is not one of the'));
    expect(() => tokenizer.encode(7 as unknown as string)).toThrow(invalid('string'));
  });

  test('a character that the vocabulary cannot write is an error, not a loss', () => {
    const tokens = tinyTokens.map((token) => (token === 'z' ? 'zz' : token));
    const lacking = tiny(['tokenizer.ggml.tokens', ['string'], tokens]);
    expect(lacking.decode(lacking.encode('hey'))).toBe('hey');
    expect(() => lacking.encode('a z')).toThrow(unsupported('cannot write'));
  });

  test('tokens of one name: texts get the last, both decode; user-defined tokens are always found', () => {
    const tokens = [...tinyTokens, 'hello', '[INST]', 'gone'];
    const doubled = tiny(
      ['tokenizer.ggml.tokens', ['string'], tokens],
      ['tokenizer.ggml.token_type', ['i32'], tokens.map((token, i) => (i < 3 ? 3 : token === '[INST]' ? 4 : token === 'gone' ? 5 : 1))],
    ); // prettier-ignore
    const [first, last] = [tinyTokens.indexOf('hello'), tinyTokens.length];
    expect([...doubled.encode('hello')]).toEqual([last]);
    expect(doubled.decode([first, last, last + 2])).toBe('hellohellogone');
    expect([...doubled.encode('[INST]')]).toEqual([last + 1]);
    expect(doubled.decode([last + 1])).toBe('[INST]');
  });

  const cases: [string, Entry[], Error][] = [
    ['another tokenizer', [['tokenizer.ggml.model', 'string', 'bert']], unsupported("'bert'".replaceAll("'", '"'))],
    ['another pre-tokenizer', [['tokenizer.ggml.pre', 'string', 'nobody']], unsupported('"nobody"')],
    ['a number for the pre-tokenizer', [['tokenizer.ggml.pre', 'u32', 1]], unsupported('pre-tokenizer')],
    ['tokens that are numbers', [['tokenizer.ggml.tokens', ['u32'], [1]]], corrupt('no list of strings')],
    ['tokens that are one string', [['tokenizer.ggml.tokens', 'string', 'a']], corrupt('no list of strings')],
    ['no tokens', [['tokenizer.ggml.tokens', ['string'], []], ['tokenizer.ggml.token_type', ['i32'], []]], corrupt('0 tokens')],
    ['types of other tokens', [['tokenizer.ggml.token_type', ['i32'], [1]]], corrupt('1 entries')],
    ['merges that are numbers', [['tokenizer.ggml.merges', ['u32'], [1]]], corrupt('no list of strings')],
    ['a merge of one part', [['tokenizer.ggml.merges', ['string'], ['he']]], corrupt('"he" makes no token')],
    ['a merge to nothing', [['tokenizer.ggml.merges', ['string'], ['q q']]], corrupt('"q q" makes no token')],
    ['a BOS outside', [['tokenizer.ggml.bos_token_id', 'u32', 9999]], corrupt('BOS 9999')],
    ['a user-defined token of a megabyte', [['tokenizer.ggml.tokens', ['string'], ['x'.repeat(2 ** 20 + 1)]], ['tokenizer.ggml.token_type', ['i32'], [4]], ['tokenizer.ggml.merges', ['string'], []]], corrupt('too long')],
    ['a flag that is no truth value', [['tokenizer.ggml.add_bos_token', 'u32', 1]], corrupt('no truth value')],
  ]; // prettier-ignore
  test.each(cases)('refused: %s', (_, changes, error) => expect(() => tiny(...changes)).toThrow(error));
  test('refused: none at all', () => {
    expect(() => fromGguf([])).toThrow(unsupported('brings no tokenizer'));
    expect(() => fromGguf(tinyVocabulary.slice(0, 2))).toThrow(corrupt('no tokens'));
    expect(() => fromGguf(tinyVocabulary.filter(([key]) => !key.includes('merges')))).toThrow(
      corrupt('no merges'),
    );
  });
});

/** Three control tokens, the 256 bytes, then pieces with their scores. */
function pieces(random: Random) {
  const letters = ['\u2581', 'a', 'b', 'c', 'd', '\u00e9'];
  const words = new Set(letters);
  while (words.size < 80) {
    const list = [...words];
    const word = random.pick(list) + random.pick(list);
    if (Array.from(word).length <= 6) words.add(word);
  }
  const bytes = Array.from({ length: 256 }, (_, i) => `<0x${i.toString(16).toUpperCase().padStart(2, '0')}>`);
  const tokens = ['<unk>', '<s>', '</s>', ...bytes, ...words];
  const scores = tokens.map((_, id) => (id < 259 ? 0 : -id));
  return { tokens, scores };
}

describe('SentencePiece', () => {
  const { tokens, scores } = pieces(new Random(8));
  const metadata: Entry[] = [
    ['tokenizer.ggml.model', 'string', 'llama'],
    ['tokenizer.ggml.tokens', ['string'], tokens],
    ['tokenizer.ggml.scores', ['f32'], scores],
    [
      'tokenizer.ggml.token_type',
      ['i32'],
      tokens.map((_, id) => (id === 0 ? 2 : id < 3 ? 3 : id < 259 ? 6 : 1)),
    ],
    ['tokenizer.ggml.bos_token_id', 'u32', 1],
  ];
  const tokenizer = fromGguf(metadata);
  const bytes = Array.from({ length: 256 }, (_, byte) => 3 + byte);
  const reference = {
    ids: new Map(tokens.map((token, id) => [token, id] as const).slice(259)),
    scores,
    bytes,
  };

  test('merges as the definition does, and gives every text back', () => {
    const random = new Random(9);
    expect(tokenizer).toMatchObject({ kind: 'SentencePiece BPE', bos: 1, addsBos: true });
    for (let round = 0; round < 500; round++) {
      const length = 1 + random.below(30);
      const text = Array.from({ length }, () => random.pick(['a', 'b', 'c', 'd', '\u00e9', ' ', ' ', 'x', '\n', '\u{1f999}'])).join(''); // prettier-ignore
      const ids = tokenizer.encode(text);
      expect([...ids]).toEqual([1, ...mergeByScore(`\u2581${text.replaceAll(' ', '\u2581')}`, reference)]);
      expect(tokenizer.decode(ids)).toBe(text);
    }
  });

  test('pieces with a space inside do not let texts fall apart there', () => {
    const spaced = [...tokens, 'a\u2581', 'a\u2581b'];
    const change: Entry[] = [
      ['tokenizer.ggml.tokens', ['string'], spaced],
      ['tokenizer.ggml.scores', ['f32'], [...scores, -1, -2]],
    ];
    const others = metadata.filter(([key]) => !/tokens|scores|types?$/.test(key));
    const types: Entry = [
      'tokenizer.ggml.token_type',
      ['i32'],
      spaced.map((_, id) => (id < 3 ? 3 : id < 259 ? 6 : 1)),
    ];
    const joined = fromGguf([...others, ...change, types]);
    expect(named(joined, joined.encode('da b', { bos: false })).at(-1)).toBe('a\u2581b');
  });

  test('the space before a text goes; where tokens follow others it stays', () => {
    const ids = tokenizer.encode('a b', { bos: false });
    expect(tokenizer.decode(ids)).toBe('a b');
    expect(tokenizer.decode(ids, { continues: true })).toBe(' a b');
    expect(tokenizer.decode([1, ...ids])).toBe('a b');
    const plain = fromGguf([...metadata, ['tokenizer.ggml.add_space_prefix', 'bool', false]]);
    const [bare] = plain.encode('a', { bos: false });
    expect(plain.token(bare!)).toBe('a');
    expect(plain.decode(plain.encode(' a'))).toBe(' a');
  });

  test('bytes of a character come one by one', () => {
    const stream = tokenizer.stream({ continues: true });
    const parts = [...tokenizer.encode('\u{1f999}', { bos: false })].map((id) => stream.push(id));
    expect(parts).toEqual([' ', '', '', '', '\u{1f999}']);
  });

  const without = (key: string) => metadata.filter(([name]) => !name.endsWith(key));
  test.each<[string, Entry[], Error]>([
    ['no scores', without('scores'), corrupt('no scores')],
    ['scores of others', [...without('scores'), ['tokenizer.ggml.scores', ['f32'], [0]]], corrupt('1 entries')],
    ['a piece that would take for ever', [...without('tokens'), ['tokenizer.ggml.tokens', ['string'], tokens.with(300, 'a'.repeat(20000))]], corrupt('too long')],
    ['a score NaN', [...without('scores'), ['tokenizer.ggml.scores', ['f32'], scores.with(300, NaN)]], corrupt('finite')],
  ])('refused: %s', (_, entries, error) => expect(() => fromGguf(entries)).toThrow(error)); // prettier-ignore

  test('the vocabulary of a llama2.c checkpoint', () => {
    const writer = new Writer().value('i32', 9);
    tokens.forEach((token, id) => {
      const text = new TextEncoder().encode(
        id === 1 || id === 2 ? `\n${token}\n` : token.replaceAll('\u2581', ' '),
      );
      writer.value('f32', scores[id]!).value('i32', text.length).raw(text);
    });
    const file = writer.finish();
    const read = (bytes: Uint8Array) => llama2cTokenizer('v', tokens.length, new Cursor(memorySource(bytes)));
    const ours = read(file);
    expect(ours).toMatchObject({ bos: 1, addsBos: true, size: tokens.length });
    for (const text of ['abcd abba', ' \u00e9\u{1f999} ', 'x'])
      expect(ours.encode(text)).toEqual(tokenizer.encode(text));
    for (let length = 0; length < file.length; length += length < 100 ? 1 : 37)
      expect(() => read(file.subarray(0, length))).toThrow(corrupt('ends at byte'));
    expect(() => read(Uint8Array.of(...file, 0))).toThrow(corrupt('1 bytes more'));
    const negative = file.slice();
    new DataView(negative.buffer).setInt32(8, -1, true);
    expect(() => read(negative)).toThrow(corrupt('-1 bytes'));
    const long = file.slice();
    new DataView(long.buffer).setInt32(8, 2 ** 31 - 1, true);
    expect(() => read(long)).toThrow(corrupt('a string of'));
  });
});

describe('tokenizer.json', () => {
  const vocab = Object.fromEntries(tinyTokens.slice(3).map((token, i) => [token, 3 + i]));
  const added = tinyTokens
    .slice(0, 3)
    .map((content, id) => ({ id, content, special: true, normalized: false }));
  const json = {
    added_tokens: added,
    normalizer: null,
    pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, use_regex: true },
    post_processor: { type: 'TemplateProcessing', single: [{ SpecialToken: { id: '<|im_start|>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }] },
    decoder: { type: 'ByteLevel' },
    model: { type: 'BPE', vocab, merges: ['h e', 'l l', 'he ll', 'hell o'] },
  }; // prettier-ignore
  const make = (changed: object = {}, config: object = { bos_token: '<|im_start|>' }) => {
    const written = JSON.parse(JSON.stringify({ ...json, ...changed })) as Record<string, unknown>;
    return makeTokenizer(hubSource('tokenizer.json', written, config as Record<string, unknown>));
  };

  test('BOS by the template, by the configuration, or not at all', () => {
    expect([...make().encode('hello')]).toEqual([1, tinyTokens.indexOf('hello')]);
    const nested = {
      post_processor: { type: 'Sequence', processors: [{ type: 'ByteLevel' }, json.post_processor] },
    };
    expect(make(nested).addsBos).toBe(true);
    expect(make({}, { bos_token: { content: '<|im_start|>' }, add_bos_token: false })).toMatchObject({
      bos: 1,
      addsBos: false,
    });
    expect(make({ post_processor: null }).addsBos).toBe(false);
    expect(make({}, {})).toMatchObject({ bos: undefined, addsBos: false });
  });

  test('control tokens that the vocabulary knows too do not come out of plain texts', () => {
    const model = { ...json.model, vocab: { ...vocab, '<|im_end|>': 2 }, ignore_merges: true };
    const whole = make({
      model,
      pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, use_regex: false },
    });
    expect([...whole.encode('<|im_end|>', { bos: false })]).toHaveLength(10);
    expect([...whole.encode('<|im_end|>', { bos: false, special: true })]).toEqual([2]);
  });

  test('merges as pairs, missing parts, Metaspace decoders', () => {
    const pairs = { ...json.model, merges: [['h', 'e']] };
    expect(make({ model: pairs }).decode(make({ model: pairs }).encode('hehe'))).toBe('hehe');
    expect(make({ normalizer: undefined, added_tokens: undefined }, {}).encode('hello')).toHaveLength(1);
    const metaspace = { type: 'Metaspace', replacement: '\u2581', prepend_scheme: 'first' };
    const model = { type: 'BPE', vocab: { '<s>': 0, '\u2581': 1, a: 2 }, merges: [], byte_fallback: true };
    const spaced = make({ model, decoder: metaspace, pre_tokenizer: metaspace, added_tokens: [] }, {});
    expect([...spaced.encode('a a')]).toEqual([1, 2, 1, 2]);
    expect(spaced.decode([1, 2, 1, 2])).toBe('a a');
  });

  test.each<[string, object, Error]>([
    ['Unigram', { model: { type: 'Unigram', vocab: [] } }, unsupported('Unigram')],
    ['no model', { model: null }, corrupt('no model')],
    ['a list for a vocabulary', { model: { ...json.model, vocab: [] } }, corrupt('vocabulary')],
    ['an id of 2^40', { model: { ...json.model, vocab: { a: 2 ** 40 } } }, corrupt('the id')],
    ['a negative id', { model: { ...json.model, vocab: { a: -1 } } }, corrupt('the id')],
    ['an id in words', { model: { ...json.model, vocab: { a: '1' } } }, corrupt('the id')],
    ['merges of one', { model: { ...json.model, merges: [['a']] } }, corrupt('pairs')],
    ['added tokens without content', { added_tokens: [{ id: 1 }] }, corrupt('added tokens')],
    ['an added token of nothing', { added_tokens: [{ id: 1, content: '', special: true }] }, corrupt('added tokens')],
    ['WordPiece', { decoder: { type: 'WordPiece' } }, unsupported('WordPiece')],
    ['no decoder', { decoder: null }, unsupported('decoder')],
  ])('refused: %s', (_, changed, error) => expect(() => make(changed)).toThrow(error)); // prettier-ignore

  test('parts that the package does not know fail when a text is encoded', () => {
    for (const changed of [
      { pre_tokenizer: { type: 'None such' } },
      { normalizer: { type: 'Sequence', normalizers: 7 } },
    ])
      expect(() => make(changed).encode('a')).toThrow(corrupt('does not work'));
  });
});
