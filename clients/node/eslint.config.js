import js from '@eslint/js';
import tseslint from 'typescript-eslint';

export default tseslint.config(
  { ignores: ['dist/', 'out/', 'src/gen/'] },
  js.configs.recommended,
  {
    files: ['**/*.ts'],
    extends: [...tseslint.configs.strictTypeChecked, ...tseslint.configs.stylisticTypeChecked],
    languageOptions: { parserOptions: { projectService: true } },
    rules: {
      // Numbers in messages are times and counts.
      '@typescript-eslint/restrict-template-expressions': ['error', { allowNumber: true }],
      // Names of properties that are left out of a copy.
      '@typescript-eslint/no-unused-vars': ['error', { ignoreRestSiblings: true }],
      // Where a value cannot be missing, the cast names its type.
      '@typescript-eslint/non-nullable-type-assertion-style': 'off',
    },
  },
  {
    // `test` and `describe` of node:test return promises that the runner awaits.
    files: ['test/**/*.ts'],
    rules: { '@typescript-eslint/no-floating-promises': 'off' },
  },
  { files: ['**/*.js'], languageOptions: { globals: { URL: 'readonly' } } },
);
