'use strict';

// Tests are only transpiled here (tsconfig.json sets isolatedModules); `npm run typecheck` checks the types.
module.exports = {
  testEnvironment: 'node',
  roots: ['<rootDir>/test'],
  testMatch: ['**/*.test.ts'],
  transform: { '^.+\\.ts$': ['ts-jest', { tsconfig: 'tsconfig.json' }] },
};
