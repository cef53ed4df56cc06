// Tells Node that the files below dist/cjs are CommonJS, although the package is of the type "module".
import { writeFileSync } from 'node:fs';

writeFileSync(new URL('../dist/cjs/package.json', import.meta.url), '{ "type": "commonjs" }\n');
