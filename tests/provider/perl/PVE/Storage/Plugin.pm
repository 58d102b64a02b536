package PVE::Storage::Plugin;

# A stand-in for the base class of storage plugins: what the tests of Fleece's use of it.

use strict;
use warnings;

package PVE::Storage;

sub APIVER { return 15 }
sub APIAGE { return 6 }

1;
