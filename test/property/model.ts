/** A cache and the naive model of it side by side: every operation is done to both, and both must hold the same. */
import { type KvCache, type Sequence } from '../../lib';
import { type CachedToken } from '../reference/cache';
import { toHalfBits } from '../reference/half';
import { attend, attentionDifferences, referenceRows } from '../support/attention';
import { expectedReadBack, interleave, readBackDifference, RememberingHead } from '../support/native';
import { expectedPage, pageDifference } from '../support/pages';
import { plantedTokens, Random } from '../support/random';
import { cacheOf, GROUP, type World } from './worlds';

const POOL = 3000;
const pool = plantedTokens(new Random(1), POOL, 64);
const MOST_TOKENS = 330;
const MOST_SEQUENCES = 5;

/** One head of the model: the reference's array of tokens, and which positions were removed by hand. */
interface ModelHead {
  readonly head: RememberingHead;
  readonly removed: Set<number>;
}

interface Twin {
  readonly native: Sequence;
  /** [layers][kvHeads] */
  readonly layers: ModelHead[][];
  /** Truncated tokens leave their bits in slots that nothing reads: pages cannot be compared whole any more. */
  truncated: boolean;
}

/** Numbers that say which operation, on what, with what: any numbers make a legal one. */
export interface Operation {
  readonly kind: string;
  readonly on: number;
  readonly size: number;
  readonly data: number;
}

const quantised = ({ key, value }: CachedToken) => key.kind !== 'window' && value.kind !== 'window';

export class Pair {
  readonly cache: KvCache;
  private readonly twins: Twin[] = [];
  /** How often each outcome was met. */
  readonly met = new Map<string, number>();

  constructor(private readonly world: World) {
    this.cache = cacheOf(world);
    this.add();
  }

  dispose(): void {
    for (const { native } of this.twins) native.dispose();
    expect(this.cache.stats()).toMatchObject({ usedBytes: 0, sequences: 0 });
    this.cache.dispose();
  }

  async run(operation: Operation): Promise<void> {
    const twin = this.twins[operation.on % this.twins.length]!;
    const layer = Math.floor(operation.on / 8) % this.world.layers.length;
    const act = this.actions[operation.kind]!;
    const outcome = await act(twin, layer, operation);
    this.count(outcome === undefined ? operation.kind : `${operation.kind}: ${outcome}`);
  }

  /** Everything that all sequences hold. `pages`: the page bytes too. */
  check(pages = false): void {
    for (const twin of this.twins) this.checkTwin(twin, pages);
  }

  private checkTwin({ native, layers, truncated }: Twin, pages = false): void {
    layers.forEach((heads, layer) => {
      const state = native.layerState(layer);
      const { head: first } = heads[0]!;
      expect([native.length(layer), state.tokens]).toEqual([first.length, first.length]);
      let removed = 0;
      heads.forEach(({ head, removed: gone }, h) => {
        const live = (tensor: 'key' | 'value') =>
          head.tokens.filter((token) => token[tensor].kind !== 'window').length;
        expect([state.keysQuantised, state.valuesQuantised]).toEqual([
          live('key') + gone.size,
          live('value') + gone.size,
        ]);
        removed += gone.size;
        const found = readBackDifference(
          native.readBackSync(layer, h),
          expectedReadBack(head),
          head.scheme.headDim,
        );
        expect(found).toBeUndefined();
        if (!pages || truncated || gone.size > 0) return;
        for (let page = 0; page * 128 < state.keysQuantised; page++)
          expect(pageDifference(native.pageBytes(layer, h, page), expectedPage(head, page))).toBeUndefined();
      });
      expect(state.removed).toBe(removed);
    });
  }

  private count(what: string): void {
    this.met.set(what, (this.met.get(what) ?? 0) + 1);
  }

  private add(native = this.cache.sequence(), layers?: ModelHead[][], truncated = false): void {
    this.twins.push({
      native,
      truncated,
      layers:
        layers ??
        this.world.layers.map((heads) =>
          heads.map((scheme) => ({ head: new RememberingHead(scheme), removed: new Set<number>() })),
        ),
    });
  }

  private copyOf({ layers }: Twin): ModelHead[][] {
    return layers.map((heads) =>
      heads.map(({ head, removed }) => ({ head: head.fork(), removed: new Set(removed) })),
    );
  }

  /** Does it, or sees it fail for want of memory and nothing changed. True: it was done. */
  private async affordable(act: () => unknown): Promise<boolean> {
    const before = this.cache.stats();
    try {
      await act();
      return true;
    } catch (error) {
      expect(error).toMatchObject({ name: 'KvError', code: 'ERR_INNERKV_OUT_OF_MEMORY' });
      expect(this.cache.stats()).toMatchObject({
        usedBytes: before.usedBytes,
        sequences: before.sequences,
      });
      this.check();
      return false;
    }
  }

  /** [heads][count] tokens from the pool. */
  private tokens(layer: number, count: number, data: number): Float32Array[][] {
    return this.world.layers[layer]!.map((_, h) =>
      Array.from({ length: count }, (_, i) => pool[(data + 613 * h + i) % POOL]!),
    );
  }

  private readonly actions: Readonly<
    Record<string, (twin: Twin, layer: number, operation: Operation) => Promise<string | undefined>>
  > = {
    append: async (twin, layer, { size, data }) => {
      const heads = twin.layers[layer]!;
      const count = Math.min(size % 9 === 8 ? 131 : 1 + (size % 24), MOST_TOKENS - heads[0]!.head.length);
      if (count < 1) return 'full';
      const [keys, values] = [this.tokens(layer, count, data), this.tokens(layer, count, data + 1000)];
      const [k, v] = [interleave(keys), interleave(values)];
      const done = await this.affordable(() => {
        if (data % 3 === 0) return twin.native.append(layer, k, v);
        if (data % 3 === 1) {
          twin.native.appendSync(layer, k, v);
          return;
        }
        twin.native.appendSync(layer, Uint16Array.from(k, toHalfBits), Uint16Array.from(v, toHalfBits));
      });
      if (!done) return 'no memory';
      heads.forEach(({ head }, h) => keys[h]!.forEach((key, i) => head.append(key, values[h]![i]!)));
      this.checkTwin(twin);
      return;
    },

    appendAll: async (_, layer, { size, data }) => {
      const items = this.twins.map((twin, i) => {
        const heads = twin.layers[layer]!;
        const count = Math.min(1 + ((size + 5 * i) % 40), MOST_TOKENS - heads[0]!.head.length);
        const [keys, values] = [this.tokens(layer, count, data + i), this.tokens(layer, count, data + 1000)];
        return { twin, heads, count, keys, values };
      });
      const open = items.filter(({ count }) => count > 0);
      const batch = open.map(({ twin, keys, values }) => ({
        sequence: twin.native,
        k: interleave(keys),
        v: interleave(values),
      }));
      const done = await this.affordable(() => {
        if (data % 2 === 0) return this.cache.appendBatch(layer, batch);
        this.cache.appendBatchSync(layer, batch);
        return;
      });
      if (!done) return 'no memory';
      for (const { heads, keys, values } of open)
        heads.forEach(({ head }, h) => keys[h]!.forEach((key, i) => head.append(key, values[h]![i]!)));
      this.check();
      return;
    },

    attend: async (twin, layer, { size, data }) => {
      const heads = twin.layers[layer]!.map(({ head }) => head);
      const queryHeads = GROUP * heads.length;
      const causal = size % 4 > 0 && heads[0]!.length > 0;
      const queries = causal ? Math.min(1 + (size % 3), heads[0]!.length) : 1 + (size % 3);
      const q = new Random(data).gaussians(queries * queryHeads * 64, 0.3);
      const rows = referenceRows(q, heads, { queries, queryHeads, causal });
      const native = attend(twin.native, layer, q, this.cache.shape, causal);
      expect(attentionDifferences(native, rows)).toEqual([]);
      if (size % 2 === 0) expect(await twin.native.attend(layer, q, { causal })).toEqual(native.out);
      return;
    },

    batch: async (_, layer, { data }) => {
      const items = this.twins.map(({ native }, i) => ({
        sequence: native,
        q: new Random(data + i).gaussians(this.cache.shape.queryHeads * 64),
      }));
      const outputs = await this.cache.attendBatch(layer, items, { causal: false });
      items.forEach(({ sequence, q }, i) =>
        expect(outputs[i]).toEqual(sequence.attendSync(layer, q, { causal: false })),
      );
      return;
    },

    fork: async (twin) => {
      if (this.twins.length === MOST_SEQUENCES) return 'full';
      const layers = this.copyOf(twin);
      const done = await this.affordable(() => this.add(twin.native.forkSync(), layers, twin.truncated));
      if (!done) return 'no memory';
      this.checkTwin(this.twins.at(-1)!);
      return;
    },

    create: async () => {
      if (this.twins.length === MOST_SEQUENCES) return 'full';
      this.add();
      return Promise.resolve(undefined);
    },

    dispose: async (twin) => {
      twin.native.dispose();
      this.twins.splice(this.twins.indexOf(twin), 1);
      if (this.twins.length === 0) this.add();
      expect(() => twin.native.length()).toThrow(
        expect.objectContaining({ code: 'ERR_INNERKV_DISPOSED' }) as Error,
      );
      return Promise.resolve(undefined);
    },

    truncate: async (twin, layer, { size }) => {
      const { length } = twin.layers[layer]![0]!.head;
      const kept = size % 4 === 3 ? size % (length + 1) : Math.max(0, length - (size % 45));
      await twin.native.truncate(kept);
      twin.truncated = true;
      for (const { head, removed } of twin.layers.flat()) {
        head.truncate(Math.min(kept, head.length));
        for (const position of removed) if (position >= head.length) removed.delete(position);
      }
      this.checkTwin(twin);
      return;
    },

    replace: async (twin, layer, { size, data }) => {
      const heads = twin.layers[layer]!;
      const position = size % (heads[0]!.head.length + 1);
      const [keys, values] = [this.tokens(layer, 1, data), this.tokens(layer, 1, data + 1)];
      const act = () => twin.native.replaceSync(layer, position, interleave(keys), interleave(values));
      if (!this.editable(layer)) return this.refused(act, 'ERR_INNERKV_UNSUPPORTED');
      const live = heads.every(({ head }) =>
        head.tokens.some((token) => token.position === position && quantised(token)),
      );
      if (!live) return this.refused(act, 'ERR_INNERKV_INVALID_ARGUMENT');
      if (!(await this.affordable(act))) return 'no memory';
      heads.forEach(({ head }, h) => head.replace(position, keys[h]![0]!, values[h]![0]!));
      this.checkTwin(twin);
      return;
    },

    remove: async (twin, layer, { size, data }) => {
      const heads = twin.layers[layer]!;
      const { length } = heads[0]!.head;
      const run = data % 5 === 0 ? 140 : 1 + (data % 6);
      const wanted = Array.from({ length: run }, (_, i) => (size % (length + 1)) + i);
      const only = data % 2 === 0 ? data % heads.length : -1;
      const all = heads[0]!;
      const stored = (position: number) =>
        all.removed.has(position) ||
        all.head.tokens.some((token) => token.position === position && quantised(token));
      const positions = data % 7 === 0 ? wanted : wanted.filter(stored);
      const act = () => twin.native.removeSync(layer, positions, only < 0 ? {} : { head: only });
      if (positions.length > 0 && !this.editable(layer)) return this.refused(act, 'ERR_INNERKV_UNSUPPORTED');
      if (!positions.every(stored)) return this.refused(act, 'ERR_INNERKV_INVALID_ARGUMENT');
      if (!(await this.affordable(act))) return 'no memory';
      heads.forEach(({ head, removed }, h) => {
        if (only >= 0 && h !== only) return;
        for (const position of positions) {
          if (removed.has(position)) continue;
          removed.add(position);
          head.remove(position);
        }
      });
      this.checkTwin(twin);
      return;
    },

    save: async (twin, _, { size, data }) => {
      let bytes = new Uint8Array();
      if (!(await this.affordable(() => (bytes = Uint8Array.from(twin.native.saveSync())))))
        return 'no memory';
      if (data % 3 === 0) {
        const at = size % bytes.length;
        const cut = data % 2 === 0;
        const broken = cut ? bytes.subarray(0, at) : bytes.map((byte, i) => (i === at ? byte ^ 16 : byte));
        return this.refused(() => this.cache.loadSync(broken), undefined);
      }
      if (this.twins.length === MOST_SEQUENCES) return 'full';
      const pieces = [bytes.subarray(0, size % bytes.length), bytes.subarray(size % bytes.length)];
      const layers = this.copyOf(twin);
      const done = await this.affordable(async () =>
        this.add(await this.cache.load(pieces), layers, twin.truncated),
      );
      if (!done) return 'no memory';
      this.checkTwin(this.twins.at(-1)!);
      return;
    },

    bad: async (twin, layer, { size, data }) => {
      const { native } = twin;
      const row = this.world.layers[layer]!.length * 64;
      const row32 = (value = 1) => new Float32Array(row).fill(value);
      const query = new Float32Array(row * GROUP);
      const INVALID = 'ERR_INNERKV_INVALID_ARGUMENT';
      const NOT_FINITE = 'ERR_INNERKV_NOT_FINITE';
      const late = row32();
      late[size % row] = [NaN, Infinity, -65520][data % 3]!;
      const acts: [string | undefined, () => unknown][] = [
        [NOT_FINITE, () => native.appendSync(layer, late, row32())],
        [NOT_FINITE, () => native.append(layer, row32(), late)],
        [INVALID, () => native.append(layer, new Float32Array(row + 1), row32())],
        [INVALID, () => native.append(layer, row32(), new Float32Array(2 * row))],
        [INVALID, () => native.appendSync(this.world.layers.length, row32(), row32())],
        [INVALID, () => native.truncate(-1 - size)],
        [INVALID, () => native.attend(layer, new Float32Array(row * GROUP * 400))],
        [INVALID, () => native.attend(layer, query, { causal: false, out: new Float32Array(1) })],
        [INVALID, () => native.attendSync(layer, query, { causal: false, logits: new Float32Array(999) })],
        ['ABORT_ERR', () => native.append(layer, row32(), row32(), { signal: AbortSignal.abort() })],
        ['ABORT_ERR', () => native.truncate(0, { signal: AbortSignal.abort() })],
        ['ERR_INNERKV_OUT_OF_MEMORY', () => native.appendSync(layer, ...huge(row))],
      ];
      const [code, act] = acts[size % acts.length]!;
      return this.refused(act, code);
    },
  };

  /** Whether single tokens of a layer can be replaced and removed. */
  private editable(layer: number): boolean {
    const { key, value } = this.world.layers[layer]![0]!;
    if (value.group === 'tokens32') return false;
    return ![key, value].some(({ mode }) => mode.startsWith('hybrid'));
  }

  /** It must fail with this code (undefined: any KvError), and change nothing. */
  private async refused(act: () => unknown, code: string | undefined): Promise<string> {
    const before = this.cache.stats().usedBytes;
    let thrown: unknown;
    try {
      await act();
    } catch (error) {
      thrown = error;
    }
    const expected = code ?? (thrown as { code?: string } | undefined)?.code;
    if (code === 'ABORT_ERR') expect(thrown).toMatchObject({ name: 'AbortError' });
    else expect(thrown).toMatchObject({ name: 'KvError', code: expected });
    expect(this.cache.stats().usedBytes).toBe(before);
    this.check();
    return code ?? 'refused';
  }
}

const hugeTokens = new Map<number, readonly [Uint16Array, Uint16Array]>();

/** More tokens than any budget here holds. */
function huge(row: number): readonly [Uint16Array, Uint16Array] {
  const known = hugeTokens.get(row) ?? [new Uint16Array(20000 * row), new Uint16Array(20000 * row)];
  hugeTokens.set(row, known);
  return known;
}
