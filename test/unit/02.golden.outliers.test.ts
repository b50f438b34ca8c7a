import { readFileSync } from 'node:fs';
import { goldenOutliers, OUTLIERS_FILE } from '../golden/outliers';

test('the golden outlier rows are what the reference writes (native: test/native/outliers_test.cpp)', () => {
  expect(readFileSync(OUTLIERS_FILE, 'utf8')).toBe(goldenOutliers());
});
