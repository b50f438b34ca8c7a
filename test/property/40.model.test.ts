/**
 * Random operations on several sequences of one cache, beside a naive model of arrays: what is stored is equal bit for
 * bit, attention is within its bounds, and what fails changes nothing.
 * INNERKV_PROPERTY_OPS: how many operations in all; INNERKV_PROPERTY_SEED: other ones; INNERKV_PROPERTY_SHRINK=1: the
 * shortest failure.
 */
import fc from 'fast-check';
import { disposeBackends } from '../support/native';
import { Pair, type Operation } from './model';
import { worlds } from './worlds';

afterAll(disposeBackends);

const OPERATIONS = Number(process.env.INNERKV_PROPERTY_OPS ?? 3000);
const SEED = Number(process.env.INNERKV_PROPERTY_SEED ?? 1);
/** Shrinking a failure takes long, and is for finding its cause. */
const SHRINK = process.env.INNERKV_PROPERTY_SHRINK === '1';
const PER_RUN = 75;

/** Kinds by how often they are drawn. */
const WEIGHTS = {
  append: 8,
  appendAll: 2,
  attend: 4,
  batch: 1,
  fork: 2,
  create: 1,
  dispose: 1,
  truncate: 3,
  replace: 3,
  remove: 3,
  save: 3,
  bad: 2,
} as const;

const operations = fc.array(
  fc.record<Operation>({
    kind: fc.oneof(
      ...Object.entries(WEIGHTS).map(([kind, weight]) => ({ arbitrary: fc.constant(kind), weight })),
    ),
    on: fc.nat(63),
    size: fc.nat(9999),
    data: fc.nat(9999),
  }),
  { minLength: PER_RUN, maxLength: PER_RUN, size: 'max' },
);

test.each(worlds)(
  '$name',
  async (world) => {
    const met = new Map<string, number>();
    const numRuns = Math.max(1, Math.round(OPERATIONS / PER_RUN / worlds.length));
    const property = fc.asyncProperty(operations, async (list) => {
      const pair = new Pair(world);
      for (const operation of list) await pair.run(operation);
      pair.check(true);
      pair.dispose();
      for (const [what, times] of pair.met) met.set(what, (met.get(what) ?? 0) + times);
    });
    await fc.assert(property, { numRuns, seed: SEED, endOnFailure: !SHRINK });
    // Random operations that never get anywhere would prove nothing.
    const wanted = [...Object.keys(WEIGHTS), 'append: no memory', 'save: refused'];
    const missing = wanted.filter((what) => ![...met.keys()].some((name) => name.startsWith(what)));
    expect(missing).toEqual([]);
    if (process.env.INNERKV_PROPERTY_OPS) process.stderr.write(`${world.name} ${JSON.stringify([...met])}\n`);
  },
  3_600_000,
);
