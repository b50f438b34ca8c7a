import { UsageError } from '../../lib/cli/command';
import { contenderNamed, layersNamed, schemeNames } from '../../lib/cli/contenders';
import { Model } from '../../lib/model';
import { type DescribedScheme, type Moments } from '../../lib/schemes';
import { modelConfig, randomModel, removeModels } from '../support/model';
import { backendOf, disposeBackends } from '../support/native';
import { Random } from '../support/random';

let model: Model;
beforeAll(() => (model = Model.openSync(backendOf('', 1), randomModel(modelConfig()))));
afterAll(() => {
  disposeBackends();
  removeModels();
});

/** Moments that differ by `size` alone: independent channels. */
function momentsOf(size: number): Moments {
  const random = new Random(size);
  const square = Float64Array.from({ length: 64 * 64 }, (_, i) =>
    i % 65 === 0 ? size + random.below(9) : 0,
  );
  const head = { keyMean: new Float64Array(64), keyMoment: square, queryMoment: square };
  return { kvHeads: 2, headDim: 64, layers: new Map([0, 1].map((layer) => [layer, [head, head]])) };
}
const calibrations = new Map([['wiki', momentsOf(1)], ['c4', momentsOf(50)]]); // prettier-ignore
const of = (name: string) => contenderNamed(name, calibrations, model);
const lamOf = (scheme: unknown) =>
  (scheme as DescribedScheme).layer(0, model.cacheShape(), { sink: 0, recent: 0 }).basis![0]!.lam![0];

test('lists and grids', () => {
  expect(schemeNames(['q8,q4_0', 'q8'])).toEqual(['q8', 'q4_0']);
  expect(schemeNames(['{rotated,calibrated}-k{2,3}v2@{0+0,4+28}'])).toEqual([
    ...['rotated-k2v2@0+0', 'rotated-k2v2@4+28', 'rotated-k3v2@0+0', 'rotated-k3v2@4+28'],
    ...['calibrated-k2v2@0+0', 'calibrated-k2v2@4+28', 'calibrated-k3v2@0+0', 'calibrated-k3v2@4+28'],
  ]);
  expect(schemeNames(['q4_0[0=q8,1=fp16]@0+0, q8'])).toEqual(['q4_0[0=q8,1=fp16]@0+0', 'q8']);
  expect(schemeNames(['rotated-k2v2{,-no-clip}'])).toEqual(['rotated-k2v2', 'rotated-k2v2-no-clip']);
  expect(schemeNames([])).toEqual([]);
  for (const bad of ['q8,', '', 'rotated-k{2,3v2', 'a}'])
    expect(() => schemeNames([bad])).toThrow(
      new UsageError('--scheme must be names between commas, with grids in {a,b}'),
    );
});

test('windows and layers of its own, in the name', () => {
  const given = 'rotated-k2v2[0=q8,1-1=fp16]@4+28';
  const { name, scheme, windows, layers } = of(given);
  expect(name).toBe(given);
  expect((scheme as DescribedScheme).name).toBe('rotated-k2v2');
  expect(windows).toEqual({ sink: 4, recent: 28 });
  expect([...layers!].map(([layer, one]) => [layer, one.name])).toEqual([[0, 'q8'], [1, 'fp16']]); // prettier-ignore
  expect(of('q8')).toEqual({ name: 'q8', scheme: expect.anything() });
  expect([...layersNamed(['0-2=q8'], calibrations).keys()]).toEqual([0, 1, 2]);
});

test('calibrations by name; the first for those that name none; layers follow their scheme', () => {
  expect(lamOf(of('calibrated-k2v2').scheme)).toBe(lamOf(of('calibrated-k2v2:wiki').scheme));
  expect(lamOf(of('calibrated-k2v2:c4').scheme)).not.toBe(lamOf(of('calibrated-k2v2').scheme));
  const { layers } = of('calibrated-k2v2:c4[0=calibrated-k4v4,1=calibrated-k4v4:wiki]');
  expect(lamOf(layers!.get(0))).toBe(lamOf(of('calibrated-k2v2:c4').scheme));
  expect(lamOf(layers!.get(1))).toBe(lamOf(of('calibrated-k2v2').scheme));
  expect(typeof of('prompt-k2v2@4+28').scheme).toBe('function');
});

test.each([
  ['q5', 'no scheme "q5"'],
  ['q8@32', 'like 32+96'],
  ['q8[0]', 'like 0=q8'],
  ['q8[0=q5]', 'no scheme "q5"'],
  ['q8[0=q8', 'is no scheme'],
  ['@0+0', 'is no scheme'],
  ['calibrated-k2v2:news', '--calibration news=FILE'],
  ['calibrated-k9v2', 'keyBits'],
])('%s is an error of usage', (name, message) => {
  expect(() => of(name)).toThrow(UsageError);
  expect(() => of(name)).toThrow(message);
});

test('a calibrated scheme needs a file', () => {
  expect(() => contenderNamed('calibrated-k2v2', new Map(), model)).toThrow('--calibration FILE');
});
